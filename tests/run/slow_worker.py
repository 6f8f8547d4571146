"""A rank that is slowed down, for tests/run/test_slowest.py. Arguments: folder, STAGE-RANK ...

causal_lm trains at each stage, while the rank is stopped two thirds of the time from its first steps on.
"""

import os
import subprocess
from pathlib import Path

import recipe_worker

STOP_AND_GO = """
until [ -s {metrics} ]; do sleep 0.05; done
while kill -STOP {rank}; do sleep 0.08; kill -CONT {rank}; sleep 0.04; done
"""


def main(where: str, *cases: str) -> None:
    for case in cases:
        stage, slow = case.split("-")
        run = Path(where) / case
        settings = ["--quick", "--max_steps", "70", "--samples", "0", "--run_dir", str(run)]
        brake = None
        if os.environ["RANK"] == slow:
            script = STOP_AND_GO.format(metrics=run / "metrics.jsonl", rank=os.getpid())
            brake = subprocess.Popen(["sh", "-c", script], stderr=subprocess.DEVNULL)
        recipe_worker.main("causal_lm", "--deepspeed_config", f"ds_configs/causal_lm/zero{stage}.json", *settings)
        if brake is not None:
            brake.kill()  # what calls this is not stopped now
            brake.wait()

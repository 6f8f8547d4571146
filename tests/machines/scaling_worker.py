"""For tests/machines/test_scaling.py. Argument: folder. causal_lm trains a step and saves, at each stage; how many
sockets rank 0 opens for a gloo group is left in sockets.json."""

import contextlib
import json
import resource
from pathlib import Path

import recipe_worker
import torch.distributed as dist
from benchmark_agreement import sockets

from lib.distributed import ranks
from lib.errors import Stopped


def main(where: str) -> None:
    ranks.init(timeout_minutes=10)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == hard
    before = sockets()
    dist.new_group(backend="gloo")
    if ranks.rank() == 0:
        (Path(where) / "sockets.json").write_text(json.dumps(sockets() - before))
    for stage in range(4):
        settings = ["--quick", "--max_steps", "2", "--time_limit", "1e-6", "--samples", "0", "--batch_size", "4"]
        config = ["--deepspeed_config", f"ds_configs/causal_lm/zero{stage}.json"]
        with contextlib.suppress(Stopped):  # saved, without export and test
            recipe_worker.main("causal_lm", *config, *settings, "--run_dir", str(Path(where) / str(stage)))

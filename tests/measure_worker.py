"""Runs causal_lm's main() under lib/measure.py's Meter for many configs in one launch, for tests/test_compare.py. Arguments: folder, case ...

A case is NAME:JSON:setting=value,... It leaves folder/NAME-WORLD_SIZE with a rank-<rank>.json each, and the run itself in run/.
"""

import contextlib
import importlib
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import deepspeed

from lib import config
from lib.config import Stopped
from lib.ds_config import load_ds_config
from lib.measure import INSPECTED, Meter
from lib.run import Run

causal_lm: Any = importlib.import_module("recipes.causal_lm")
collate = causal_lm.collate
# Settings of a model whose matrices are above stage3_param_persistence_threshold and whose norms are below.
WIDE = "hidden_size=384,intermediate_size=512,vocab_size=300"
SLOW = 0.05  # seconds that each micro-batch of a case named "slow..." takes longer


def slow_collate(rows: dict[str, Any]) -> Any:
    time.sleep(SLOW)
    return collate(rows)


def main(folder: Path, cases: list[str]) -> None:
    world_size, batches = int(os.environ["WORLD_SIZE"]), causal_lm.training_batches
    for case in cases:
        name, json_path, settings = case.split(":")
        place = folder / f"{name}-{world_size}"
        place.mkdir(exist_ok=True)
        given = {"run_dir": str(place / "run"), "max_steps": str(INSPECTED + 2), "samples": "0"} | dict(setting.split("=") for setting in settings.split(","))
        cfg: Any = config.load(causal_lm.Config, ROOT / "recipes" / "causal_lm.yaml", given, quick=True)
        ds_config = load_ds_config(Path(json_path), cfg, world_size)
        meter = Meter(place, INSPECTED + 2, goes_on=False)
        causal_lm.deepspeed = SimpleNamespace(initialize=meter.initialize(deepspeed.initialize))
        causal_lm.training_batches = meter.training_batches(batches)
        causal_lm.collate = slow_collate if name.startswith("slow") else collate
        runs: list[Run] = []
        causal_lm.Run = lambda *arguments, runs=runs: (runs.append(Run(*arguments)), runs[0])[1]
        with contextlib.suppress(Stopped):
            causal_lm.main(cfg, ds_config)
        runs[0].close()


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    main(Path(arguments[0]), arguments[1:])
    config.leave(0)

"""Runs main() of causal_lm, pipeline_lm or sft under lib/compare/measure.py's Meter, many configs in one launch.

Used by tests/compare/test_compare.py. Arguments: folder, case ... A case is NAME:JSON:setting=value,... For each case
folder/NAME-WORLD_SIZE holds a rank-<rank>.json of each rank, and the run itself in run/.
"""

import contextlib
import functools
import importlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
from deepspeed.comm import comm
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

from lib.compare.measure import Meter
from lib.compare.results import INSPECTED
from lib.data import batches
from lib.errors import Stopped
from lib.run.run import Run
from lib.settings import config
from lib.settings.ds_config import load_ds_config, read_json

causal_lm: Any = importlib.import_module("recipes.causal_lm")
pipeline_lm: Any = importlib.import_module("recipes.pipeline_lm")
sft: Any = importlib.import_module("recipes.sft")
real_batches = batches.training_batches
# Settings of a model whose matrices are larger than stage3_param_persistence_threshold and whose norms are smaller.
WIDE = "hidden_size=384,intermediate_size=512,vocab_size=300"
# The seconds by which each phase takes longer in a case whose name begins with "slow".
SLOW = {"data": 0.05, "forward": 0.1, "backward": 0.15, "optimizer": 0.2}


def slowly(phase: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """The function, slower by the seconds of the phase."""

    @functools.wraps(real)
    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(SLOW[phase])
        return real(*arguments, **options)

    return slow


def slow_batches(*arguments: Any, **options: Any) -> Iterator[Any]:
    """training_batches, for which a step must wait: a slow collate would work beside the step before."""
    for found in real_batches(*arguments, **options):
        time.sleep(SLOW["data"])
        yield found


def initialize_slowly(*arguments: Any, **options: Any) -> Any:
    everything = deepspeed.initialize(*arguments, **options)
    engine = everything[0]
    engine.forward, engine.backward = slowly("forward", engine.forward), slowly("backward", engine.backward)
    engine.step = slowly("optimizer", engine.step)
    return everything


def main(where: str, *cases: str) -> None:
    folder = Path(where)
    world_size = int(os.environ["WORLD_SIZE"])
    attention, message_size = UlyssesSPAttentionHF.forward, comm.get_msg_size_from_args
    for case in cases:
        name, json_path, settings = case.split(":")
        case_folder = folder / f"{name}-{world_size}"
        case_folder.mkdir(exist_ok=True)
        given = {"run_dir": str(case_folder / "run"), "max_steps": str(INSPECTED + 2)} | dict(
            setting.split("=") for setting in settings.split(",")
        )
        ds_config = read_json(Path(json_path))
        recipe = pipeline_lm if "pipeline" in ds_config else sft if name.startswith("lora") else causal_lm
        given |= {"samples": "0"} if recipe is causal_lm else {}
        cfg: Any = config.load(recipe.Config, Path(recipe.__file__).with_suffix(".yaml"), given, quick=True)
        ds_config = load_ds_config(Path(json_path), cfg, world_size)
        meter = Meter(case_folder, INSPECTED + 2, goes_on=False)
        slow = name.startswith("slow")
        recipe.deepspeed = SimpleNamespace(
            initialize=meter.initialize(initialize_slowly if slow else deepspeed.initialize)
        )
        comm.get_msg_size_from_args = meter.sent.message_size(message_size)
        UlyssesSPAttentionHF.forward = meter.sent.attention(attention)
        batches.training_batches = meter.training_batches(slow_batches if slow else real_batches)
        runs: list[Run] = []
        recipe.Run = lambda *arguments, runs=runs: (runs.append(Run(*arguments)), runs[0])[1]
        with contextlib.suppress(Stopped):
            recipe.main(cfg, ds_config)
        runs[0].close()

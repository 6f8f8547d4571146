"""What a recipe's step costs beyond a bare DeepSpeed loop, on fixed-length data. Run by hand:

    deepspeed --num_accelerators 2 tests/by_hand/benchmark_overhead.py --series 5 --steps 20

One launch, one engine, one model: series of steps of causal_lm's loop (run.steps, label counts, log_step) and of a loop
of engine(...), backward and step on ready tensors take turns, so that a machine's drift meets both. Prints the medians
and peak memory. tests/by_hand/gpu_worker.py has the same loops on models of other sizes.
"""

import argparse
import importlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import deepspeed
from deepspeed.accelerator import get_accelerator

from lib.data.batches import IGNORED, training_batches
from lib.data.blocks import Blocks
from lib.distributed import ranks
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw, make_schedule
from lib.run.run import Run
from lib.settings import config
from lib.settings.ds_config import load_ds_config

causal_lm: Any = importlib.import_module("recipes.causal_lm")


class Vocabulary(tuple[int, ...]):
    """What build_model asks of a tokenizer: how many tokens there are, and which ends a text."""

    eos_token_id = 0


def load_settings(run_dir: str | Path, **settings: str) -> Any:
    """The settings of causal_lm for a run that neither saves nor changes its learning rate."""
    given = {"run_dir": str(run_dir), "save_minutes": "null", "lr_schedule": "constant", "warmup_steps": "0"}
    return config.load(causal_lm.Config, ROOT / "recipes" / "causal_lm.yaml", given | settings)


def new_model(cfg: Any) -> torch.nn.Module:
    return causal_lm.build_model(cfg, Vocabulary(range(cfg.vocab_size)))


class Loops:
    """One engine, and two loops that train it on random tokens. initialize: deepspeed.initialize, or what wraps it."""

    def __init__(
        self,
        cfg: Any,
        json_path: Path,
        build: Callable[[Any], torch.nn.Module] = new_model,
        initialize: Callable[..., Any] = deepspeed.initialize,
    ):
        ds_config = load_ds_config(json_path, cfg, ranks.world_size())
        micro = ds_config["train_micro_batch_size_per_gpu"]
        model = load_model(lambda: build(cfg), ds_config, cfg.seed)
        optimizer = make_adamw(cfg, model, ds_config)
        schedule = make_schedule(cfg, optimizer, 1)
        self.engine, _, _, _ = initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
        self.run, self.ds_config = Run(cfg, ds_config, causal_lm.__file__), ds_config
        rows = max(64, 4 * cfg.batch_size)
        tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, rows * cfg.max_length + 1).astype(np.int32)
        self.blocks = Blocks(tokens, cfg.max_length, drop_last=True)
        self.run.plan(self.blocks)
        self.run.attach(self.engine, {})
        sizes = {"batch_size": cfg.batch_size, "micro_batch_size": micro}
        batches = training_batches(self.blocks, causal_lm.collate_blocks, **sizes, seed=0, device=self.run.device)
        self.ready = [next(batches) for _ in range(4)]

    def bare(self, steps: int) -> None:
        engine = self.engine
        for step in range(steps):
            for batch in self.ready[step % 4]:
                logits = engine(input_ids=batch["input_ids"], use_cache=False).logits
                engine.backward(F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()))
                engine.step()

    def recipe(self, steps: int) -> None:
        engine, run = self.engine, self.run
        run.total_steps = run.metrics.total_steps = steps
        for step, micro_batches in run.steps(self.blocks, causal_lm.collate_blocks):
            labels = ranks.sum_over_ranks((batch["labels"] != IGNORED).sum() for batch in micro_batches)
            step_loss = torch.zeros((), device=run.device)
            for batch in micro_batches:
                loss = causal_lm.losses_of(engine, batch).sum() / labels
                engine.backward(run.undivided(loss))
                engine.step()
                step_loss += loss.detach()
            run.log_step(step, step_loss, tokens=labels)
        run._begin = lambda: None  # type: ignore[method-assign]  # what a run does once is no part of the other series


def seconds_of(loop: Callable[[int], None], steps: int) -> float:
    """Seconds a step, until the devices of all ranks have done the last one."""
    for _ in range(2):
        get_accelerator().synchronize()
        torch.distributed.barrier()
    started = time.perf_counter()
    loop(steps)
    get_accelerator().synchronize()
    torch.distributed.barrier()
    return (time.perf_counter() - started) / steps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", default="2")
    parser.add_argument("--series", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--local_rank")
    options = parser.parse_args()
    ranks.init(timeout_minutes=10)
    folder = ranks.on_rank0(tempfile.mkdtemp)
    cfg = load_settings(f"{folder}/run")
    loops = Loops(cfg, ROOT / "ds_configs" / "causal_lm" / f"zero{options.stage}.json")
    run = loops.run
    seconds: dict[str, list[float]] = {"bare": [], "recipe": []}
    peak: dict[str, int] = {}
    for series in range(-1, options.series):  # the first one warms up
        for loop in (loops.bare, loops.recipe):
            found = seconds_of(loop, options.steps)
            if series >= 0:
                seconds[loop.__name__].append(found)
            else:
                peak[loop.__name__] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for name, values in seconds.items():
        run.say(
            f"{name:<7} median {statistics.median(values) * 1000:.1f} ms a step   series: "
            + " ".join(f"{v * 1000:.1f}" for v in values)
        )
    ratios = [recipe_s / bare_s for recipe_s, bare_s in zip(seconds["recipe"], seconds["bare"], strict=True)]
    run.say(
        f"recipe / bare, pair by pair: median {statistics.median(ratios):.3f}   "
        + " ".join(f"{ratio:.3f}" for ratio in ratios)
    )
    run.say(
        f"peak memory: {peak['bare'] / 2**20:.0f} MiB after the bare loop, "
        f"{peak['recipe'] / 2**20:.0f} MiB after the recipe's"
    )
    run.close()


if __name__ == "__main__":
    main()

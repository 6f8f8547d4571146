"""What a recipe's step costs beyond a bare DeepSpeed loop, on fixed-length data. Run by hand:

    deepspeed --num_accelerators 2 tests/by_hand/benchmark_overhead.py --series 5 --steps 20

One launch, one engine, one model: series of steps of causal_lm's loop (run.steps, label counts, log_step) and of a loop
of engine(...), backward and step on ready tensors take turns, so that a machine's drift meets both. Prints the medians
and peak memory.
"""

import argparse
import importlib
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import deepspeed

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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", default="2")
    parser.add_argument("--series", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--local_rank")
    options = parser.parse_args()
    ranks.init(timeout_minutes=10)
    folder = ranks.on_rank0(tempfile.mkdtemp)
    given = {"run_dir": f"{folder}/run", "save_minutes": "null", "lr_schedule": "constant", "warmup_steps": "0"}
    cfg: Any = config.load(causal_lm.Config, ROOT / "recipes" / "causal_lm.yaml", given)
    ds_config = load_ds_config(ROOT / "ds_configs" / "causal_lm" / f"zero{options.stage}.json", cfg, ranks.world_size())
    micro = ds_config["train_micro_batch_size_per_gpu"]
    tokenizer: Any = Vocabulary(range(cfg.vocab_size))
    model = load_model(lambda: causal_lm.build_model(cfg, tokenizer), ds_config, cfg.seed)
    optimizer = make_adamw(cfg, model, ds_config)
    schedule = make_schedule(cfg, optimizer, options.steps)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    run = Run(cfg, ds_config, causal_lm.__file__)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, 2_000_000).astype(np.int32)
    blocks = Blocks(tokens, cfg.max_length, drop_last=True)
    run.plan(blocks)
    run.attach(engine, {})
    sizes = {"batch_size": cfg.batch_size, "micro_batch_size": micro}
    batches = training_batches(blocks, causal_lm.collate_blocks, **sizes, seed=0, device=run.device)
    ready = [next(batches) for _ in range(4)]

    def bare() -> None:
        for step in range(options.steps):
            for batch in ready[step % 4]:
                logits = engine(input_ids=batch["input_ids"]).logits
                engine.backward(F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()))
                engine.step()

    run.total_steps = run.metrics.total_steps = options.steps

    def recipe() -> None:
        for step, micro_batches in run.steps(blocks, causal_lm.collate_blocks):
            labels = ranks.sum_over_ranks((batch["labels"] != IGNORED).sum() for batch in micro_batches)
            step_loss = torch.zeros((), device=run.device)
            for batch in micro_batches:
                loss = causal_lm.losses_of(engine, batch).sum() / labels
                engine.backward(run.undivided(loss))
                engine.step()
                step_loss += loss.detach()
            run.log_step(step, step_loss, tokens=labels)

    seconds: dict[str, list[float]] = {"bare": [], "recipe": []}
    peak: dict[str, int] = {}
    for series in range(-1, options.series):  # the first one warms up
        for loop in (bare, recipe):
            torch.distributed.barrier()
            started = time.perf_counter()
            loop()
            torch.distributed.barrier()
            if series >= 0:
                seconds[loop.__name__].append((time.perf_counter() - started) / options.steps)
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

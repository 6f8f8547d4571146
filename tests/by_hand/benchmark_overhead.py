"""What a recipe's step costs beyond a bare DeepSpeed loop, on fixed-length data. Run by hand:

    deepspeed --num_accelerators 2 tests/by_hand/benchmark_overhead.py --series 5 --steps 20

One launch, one engine, one model: series of steps of causal_lm's loop (run.steps, training_batches, label counts, log_step, end_step) and of a loop of
engine(...), backward and step on ready tensors take turns, so that a machine's drift meets both. Prints the medians and peak memory.
"""

import argparse
import dataclasses
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
from lib.distributed.repairs import repair_stage0, veto_if_not_finite
from lib.models.losses import token_losses
from lib.run.checkpoints import Checkpoints
from lib.run.run import Run
from lib.settings import config
from lib.settings.ds_config import load_ds_config

causal_lm: Any = importlib.import_module("recipes.causal_lm")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", default="2")
    parser.add_argument("--series", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--local_rank")
    options = parser.parse_args()
    device = ranks.init(timeout_minutes=10)
    folder = ranks.on_rank0(tempfile.mkdtemp)
    given = {"run_dir": f"{folder}/run", "save_minutes": "null", "lr_schedule": "constant", "warmup_steps": "0"}
    cfg: Any = config.load(causal_lm.Config, ROOT / "recipes" / "causal_lm.yaml", given)
    ds_config = load_ds_config(ROOT / "ds_configs" / "causal_lm" / f"zero{options.stage}.json", cfg, ranks.world_size())
    micro, accumulation = ds_config["train_micro_batch_size_per_gpu"], ds_config["gradient_accumulation_steps"]
    model = load_model(lambda: causal_lm.build_model(cfg, cfg.vocab_size, 0), ds_config, cfg.seed)
    optimizer = make_adamw(cfg, model, ds_config)
    schedule = make_schedule(cfg, optimizer, options.steps)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    repair_stage0(engine)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, 2_000_000).astype(np.int32)
    batches = training_batches(
        Blocks(tokens, cfg.max_length, drop_last=True), causal_lm.collate_blocks, cfg.batch_size, micro, 0, device
    )
    ready = [next(batches) for _ in range(4)]

    def bare() -> None:
        for step in range(options.steps):
            for batch in ready[step % 4]:
                logits = engine(input_ids=batch["input_ids"]).logits
                engine.backward(F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()))
                engine.step()

    run = Run(dataclasses.replace(cfg), ds_config, causal_lm.__file__)
    checkpoints = Checkpoints(run, engine, schedule)

    def recipe() -> None:
        run.total_steps = options.steps
        for step in run.steps():
            micro_batches = next(batches)
            learning_rate = schedule.get_last_lr()[0]
            labels = ranks.all_sum(torch.stack([(batch["labels"] != IGNORED).sum() for batch in micro_batches]).sum())
            step_loss = torch.zeros((), device=device)
            for batch in micro_batches:
                loss = token_losses(causal_lm.logits_of(engine, batch), batch["labels"]).sum() / labels
                engine.backward(veto_if_not_finite(loss) * accumulation * ranks.world_size())
                engine.step()
                step_loss += loss.detach()
            run.log_step(step, step_loss, labels, learning_rate, engine.get_global_grad_norm())
            checkpoints.end_step(step, micro_batches)

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
            f"{name:<7} median {statistics.median(values) * 1000:.1f} ms a step   series: {' '.join(f'{v * 1000:.1f}' for v in values)}"
        )
    ratios = [recipe_s / bare_s for recipe_s, bare_s in zip(seconds["recipe"], seconds["bare"], strict=True)]
    run.say(
        f"recipe / bare, pair by pair: median {statistics.median(ratios):.3f}   {' '.join(f'{ratio:.3f}' for ratio in ratios)}"
    )
    run.say(
        f"peak memory: {peak['bare'] / 2**20:.0f} MiB after the bare loop, {peak['recipe'] / 2**20:.0f} MiB after the recipe's"
    )
    run.close()


if __name__ == "__main__":
    main()

"""One training run, as a recipe holds it: before the first step, between two steps, after the last one."""

import dataclasses
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from lib.data import batches
from lib.data.batches import Batch, Collate
from lib.data.rows import Splits
from lib.distributed import mesh, ranks
from lib.distributed.export import FORM, keep_form
from lib.distributed.repairs import repair_stage0, repair_tensor_parallel, veto_if_not_finite
from lib.errors import Stopped, from_home
from lib.run.checkpoints import Checkpoints
from lib.run.folder import RunFolder
from lib.run.header import header_lines
from lib.run.kept import Kept
from lib.run.metrics import Metrics
from lib.run.output import Output, log_name
from lib.run.result import Scores, write_result
from lib.run.resume import check_data, find_checkpoint, versions
from lib.run.step_end import StepEnd
from lib.settings.ds_config import NOTES, stage_of


class Run:
    """One training run. Every rank makes it, and calls the same methods in the same order.

    kept: what the model gave before training. total_steps: of the whole run. resumed_at: those that earlier starts did.
    """

    def __init__(self, cfg: Any, ds_config: dict[str, Any], recipe: str):
        started = time.monotonic()
        self.cfg, self.ds_config, self.recipe = cfg, ds_config, Path(recipe).stem
        self.device = ranks.init(cfg.rank_timeout, cfg.precision)
        self.micro_batch_size = ds_config["train_micro_batch_size_per_gpu"]
        mesh.form(ds_config)
        self._run_folder = RunFolder(cfg, ds_config, self.recipe)
        self.folder = self._run_folder.path
        self.checkpoint, notes = find_checkpoint(self.folder, self.recipe, cfg)  # what --resume goes on from
        self.notes = [*ds_config.pop(NOTES, []), *notes]
        self.kept = Kept(self.folder, resumed=self.checkpoint is not None)
        overwrites = self._run_folder.overwrites
        if self.checkpoint is None and not overwrites:  # else in _begin: a start that is refused changes nothing
            ranks.on_rank0(lambda: self._run_folder.write_facts(0))
        self.output = Output(self.folder / f"{'.' if overwrites else ''}{log_name()}")
        self.say = self.output.say
        seconds_before = self.checkpoint[1]["seconds"] if self.checkpoint else 0.0
        self.metrics = Metrics(self.folder, cfg.log_every, self.output, started=started, seconds_before=seconds_before)
        place_monitors(ds_config, self.folder)
        self.total_steps = self.resumed_at = 0

    def plan(self, rows: Any, splits: Splits | None = None) -> None:
        """Set total_steps to what the settings max_steps and epochs ask for on these training rows.

        splits: the data that they are made from, which the header shows. A resumed run must have both again.
        """
        self.splits, self._rows = splits, rows
        data = getattr(splits, "fingerprint", None)
        self._data: dict[str, Any] = {"rows": len(rows), "data": data, "sample": batches.fingerprint(rows)}
        max_steps, epochs = self.cfg.max_steps, self.cfg.epochs  # just one of them is given
        steps = max_steps if max_steps is not None else max(1, math.ceil(epochs * len(rows) / self.cfg.batch_size))
        self.total_steps = self.metrics.total_steps = steps
        if self.checkpoint is not None:
            check_data(self.checkpoint, self._data, steps, self.cfg.dataset)

    def attach(self, engine: Any, rows: dict[str, int], notes: Sequence[str] = (), *tokenizers: Any) -> None:
        """Take the engine of deepspeed.initialize: repair its stage 0, connect its monitors, and print the header.

        rows: their number by split. tokenizers: those that export will get.
        """
        repair_stage0(engine)
        repair_tensor_parallel(engine, self.cfg.batch_size)
        self.engine, self._tokenizers = engine, tokenizers
        self.metrics.monitor = engine.monitor if engine.monitor.enabled else None
        ranks.set_timeout(self.cfg.rank_timeout)  # of the process groups that DeepSpeed has made, too
        for line in header_lines(self, rows, notes):
            self.say(line)
        parts: dict[str, Any] = {"run_folder": self.folder, "metrics": self.metrics, "output": self.output}
        self.checkpoints = Checkpoints(self.cfg, engine, **parts, facts=self._facts)
        ranks.on_rank0(lambda: self.checkpoints.prepare(self._run_folder.overwritten_bytes()))
        self._end_step = StepEnd(self.cfg, engine, **parts, checkpoints=self.checkpoints)

    def _facts(self, step: int) -> dict[str, Any]:
        """What a checkpoint of the state after a step keeps of the run, beside the engine's state."""
        facts = {"stage": stage_of(self.ds_config), "settings": dataclasses.asdict(self.cfg), "versions": versions()}
        return {"recipe": self.recipe, **self._data, **facts, **batches.position(self._rows, step)}

    def _begin(self) -> None:
        """Only now, when training begins, does anything change in a run folder that was there before."""
        self.resumed_at = self.checkpoints.resume(self.checkpoint) if self.checkpoint is not None else 0
        ranks.on_rank0(lambda: self._run_folder.begin(self.resumed_at, self.kept.values))
        keep_form(self.engine, self.folder / FORM, *self._tokenizers)

    def steps(
        self, rows: Any, collate: Collate, lengths: Sequence[int] | None = None, packing: bool | None = None
    ) -> Iterator[tuple[int, list[Batch]]]:
        """(step, this rank's micro-batches) for each optimizer step still to do. Arguments: see training_batches.

        Before the first step the run resumes, or begins anew. Before each step the random generators are seeded by the
        seed, the step and the dropout rank, so that dropout does not depend on what ran before. After each step
        StepEnd saves when that is due, and stops when asked. After the last step, with keep_best, the engine gets the
        best weights. A `break` in the loop leaves out what comes after it.
        """
        self._begin()
        cfg, self._rows = self.cfg, rows
        sizes = {"batch_size": cfg.batch_size, "micro_batch_size": self.micro_batch_size, "seed": cfg.seed}
        order: Any = {"lengths": lengths, "packing": packing, "start": self.resumed_at}
        order["position"] = self.checkpoint and self.checkpoint[1].get("stream")
        step_batches = batches.training_batches(rows, collate, device=self.device, **sizes, **order)
        self.output.begin_steps(self.resumed_at, self.total_steps)
        self.metrics.restart_clock()
        for step in range(self.resumed_at + 1, self.total_steps + 1):
            set_seed(int(np.random.SeedSequence((cfg.seed, step, mesh.dropout_rank())).generate_state(1)[0]))
            self._learning_rate = self.engine.lr_scheduler.get_last_lr()[0]
            micro_batches = next(step_batches)
            yield step, micro_batches
            try:
                self._end_step(step, micro_batches)
            except Stopped:
                self.close()
                raise
            self.metrics.end_interruption()
        self.metrics.interrupt()
        self.output.end_steps()
        self.checkpoints.take_best()

    def undivided(self, loss: torch.Tensor) -> torch.Tensor:
        """This rank's share of the step's mean loss, as engine.backward needs it.

        DeepSpeed divides gradients by accumulation steps and gradient ranks, but the loss has been divided by the
        labels of the whole step. A loss that is not finite becomes NaN, so that DeepSpeed leaves the weights alone.
        """
        accumulation_steps = self.ds_config["gradient_accumulation_steps"]
        return veto_if_not_finite(loss) * accumulation_steps * mesh.gradient_size()

    def log_step(self, step: int, loss: torch.Tensor, tokens: torch.Tensor, **figures: torch.Tensor) -> None:
        """Note an optimizer step. loss, figures: this rank's shares, summed over ranks here. tokens: over all ranks."""
        rate, norm = self._learning_rate, self.engine.get_global_grad_norm()
        self.metrics.note_step(step, loss=loss, tokens=tokens, learning_rate=rate, grad_norm=norm, **figures)

    def evaluation_due(self, step: int) -> bool:
        """Whether to score the validation rows now: after the last step, which is tested, only to find the best one.

        Every rank must call it. What is done from then on until the next step counts as no step's time.
        """
        every, is_last = self.cfg.eval_every, step == self.total_steps
        due = every is not None and (self.cfg.keep_best if is_last else step % every == 0)
        if due:
            self.metrics.interrupt()
            self.checkpoints.finish()  # a long evaluation keeps no checkpoint waiting for its name
        return due

    def log_scores(
        self, step: int, split: str, scores: dict[str, float], higher_is_better: str = "", lower_is_better: str = ""
    ) -> None:
        """Write and say scores, which are the same on all ranks. keep_best goes by the one that is named, if one is."""
        self.metrics.write_scores(step, split, scores)
        for name, sign in ((higher_is_better, 1), (lower_is_better, -1)):
            if name:
                self.checkpoints.note_score(step, sign * scores[name])

    def finish(self, scores: dict[str, float], tested_on: str, baselines: Scores) -> Scores:
        """Say the test scores as a table and write result.json. Returns the scores of "model" and of each baseline.

        tested_on: such as "1,480 test rows".
        """
        write_result({f"this model, {tested_on}": scores, **baselines}, self._run_folder, self.metrics, self.output)
        self.close()
        return {"model": scores, **baselines}

    def close(self) -> None:
        """Give the process its own output back, and the folder to others."""
        self.output.close()
        self._run_folder.unlock()


def place_monitors(ds_config: dict[str, Any], folder: Path) -> None:
    """Let DeepSpeed's monitors write into the run folder, unless the JSON says where."""
    for section in ("tensorboard", "csv_monitor"):
        if ds_config.get(section, {}).get("enabled"):
            options = {"output_path": str(folder), "job_name": section, **ds_config[section]}
            ds_config[section] = options | {"output_path": from_home(options["output_path"])}
    os.environ.setdefault("WANDB_DIR", str(folder))

"""What happens between two steps: a step that is not finite, a signal to stop, a checkpoint that is due.

All ranks decide together: what one rank notices (a signal, the time) is told to all before any of them acts.
"""

import contextlib
import json
import math
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lib.distributed import ranks, waits
from lib.errors import FAULT, STOPPED, Stopped, UserError, display_path
from lib.run import checkpoint_files
from lib.run.checkpoints import Checkpoints
from lib.run.metrics import Metrics
from lib.run.output import Output

# SIGHUP: the terminal has closed; SIGUSR1: Slurm's warning, with --signal
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
TIME_LIMIT = 1000.0  # in the place of a signal's number


class StepEnd:
    """Called after each step, by every rank. Made after deepspeed.initialize; from then on signals are noted."""

    def __init__(
        self, cfg: Any, engine: Any, *, run_folder: Path, metrics: Metrics, output: Output, checkpoints: Checkpoints
    ):
        self.cfg, self.engine, self.run_folder = cfg, engine, run_folder
        self.checkpoints, self.metrics, self.output = checkpoints, metrics, output
        self.stop = 0.0  # the number of the signal that came to this rank
        for number in SIGNALS:
            # nohup ignores SIGHUP: the run is to go on without the terminal
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note_signal)

    def _note_signal(self, number: int, _: Any) -> None:
        self.stop = float(number)
        ranks.asked_to_stop.set()

    def __call__(self, step: int, micro_batches: list[dict[str, torch.Tensor]]) -> None:
        """Save when it is due.

        Raises UserError at a step whose loss or gradient is not finite (DeepSpeed has then left the weights as they
        were), unless such steps are skipped, and Stopped after a signal or at the time limit; the state is saved before
        either.
        """
        if not self.engine.was_step_applied():
            self._not_applied(step, micro_batches)
        checkpoints, total_steps = self.checkpoints, self.metrics.total_steps
        # Rank 0 decides what depends on a clock or a score; a signal may come to any rank.
        due = best = False
        if ranks.rank() == 0:
            due, best = checkpoints.is_due_by_time(), checkpoints.is_best(step)
            if self.cfg.time_limit is not None and self.metrics.minutes_of_this_start() >= self.cfg.time_limit:
                self.stop = self.stop or TIME_LIMIT
        flags = [self.stop, float(due), float(best), float(checkpoints.is_writing())]
        with waits.waiting():
            stop, due_now, best_now, writing_somewhere = ranks.largest(flags)
        if not writing_somewhere:
            checkpoints.finish()
        is_last = step == total_steps
        by_steps = self.cfg.save_every is not None and step % self.cfg.save_every == 0
        by_time = due_now and not writing_somewhere  # the disk may need longer than save_minutes
        if by_time or by_steps or best_now or (stop and not is_last) or (is_last and checkpoints.saves):
            checkpoints.save(step)
        saved = checkpoints.finish() if stop or is_last else True
        if stop and not is_last:
            why = "the time limit" if stop == TIME_LIMIT else signal.Signals(int(stop)).name
            how = f"--run_dir {display_path(self.run_folder)} --resume goes on"
            kept = f"saved; {how}" if saved else f"NOT saved; {how} from an earlier checkpoint, if there is one"
            raise Stopped(f"stopped by {why} after step {step}/{total_steps}: {kept}", STOPPED if saved else FAULT)

    def _not_applied(self, step: int, micro_batches: list[dict[str, torch.Tensor]]) -> None:
        """DeepSpeed found a gradient that is not finite and left the weights alone: skip the step, or stop and keep the
        evidence."""
        loss = self.metrics.loss_of(step)
        if math.isfinite(loss) and self.cfg.precision == "fp16":
            self.metrics.skipped_steps += 1  # how the loss scale is found
            return
        what = f"the loss is {loss}" if not math.isfinite(loss) else "the norm of the gradient is not finite"
        if self.cfg.not_finite == "skip":
            self.metrics.skipped_steps += 1
            so_far = f"({self.metrics.skipped_steps} skipped so far)"
            self.output.say(f"step {step}/{self.metrics.total_steps}  skipped: {what} {so_far}")
            return
        evidence = self.run_folder / f"not_finite-step-{step:08d}"
        tensors = {
            f"{number}/{name}": tensor.clone()
            for number, batch in enumerate(micro_batches)
            for name, tensor in batch.items()
        }
        with contextlib.suppress(OSError, SafetensorError):  # a full disk must not hide what the matter is
            evidence.mkdir(exist_ok=True)
            save_file(tensors, evidence / f"batch-rank-{ranks.rank():05d}.safetensors")
        # The weights are still as they were before this step.
        self.checkpoints.finish()
        before = self.checkpoints.folder / checkpoint_files.folder_of(step - 1)
        saved = step == 1 or ranks.on_rank0(before.exists)
        if not saved:
            self.checkpoints.save(step - 1)
            saved = self.checkpoints.finish()
        if ranks.rank() == 0:
            rate = self.engine.lr_scheduler.get_last_lr()[0]
            facts = {"step": step, "what": what, "learning_rate": rate, "state_before": saved}
            with contextlib.suppress(OSError):
                (evidence / "report.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        raise UserError(
            f"{what} at step {step}; the weights are still those of step {step - 1}, the batch is in "
            f"{display_path(evidence)}; go on from before it with --resume --not_finite skip, or start anew with a "
            "lower learning_rate or --precision fp32"
        )

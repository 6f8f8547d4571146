"""What happens between two steps: a step that is not finite, a signal to stop, a checkpoint that is due; and going on from one.

All ranks decide together: what one rank notices (a signal, the time) is told to all before any of them acts.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lib.distributed import ranks
from lib.distributed.zero_state import loss_scaler, shapes
from lib.errors import STOPPED, Stopped, UserError, display_path
from lib.run import checkpoint_files
from lib.run.run import Run, versions
from lib.settings.ds_config import stage_of

SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
)  # SIGHUP: the terminal has closed; SIGUSR1: Slurm's warning, with --signal
TIME_LIMIT = 1000.0  # in the place of a signal's number
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what fp16's loss scaler changes


class Checkpoints:
    """The checkpoints of one run, in <run folder>/checkpoints. Made after deepspeed.initialize, by every rank."""

    def __init__(self, run: Run, engine: Any, schedule: Any):
        self.run, self.cfg, self.engine, self.schedule = run, run.cfg, engine, schedule
        self.folder = run.folder / "checkpoints"
        self.saved_at = time.monotonic()  # the clock of rank 0 decides
        self.flush: checkpoint_files.Flush | None = None  # of the newest checkpoint, until it is on the disk
        self.stop = 0.0  # the number of the signal that came to this rank
        self.step_score: tuple[int, float] = (0, -math.inf)  # (step, score) of the last evaluation
        self.best_score = -math.inf
        self.undeletable: set[Path] = set()  # old checkpoints, each warned of once
        self.saves = self.cfg.save_every is not None or self.cfg.save_minutes is not None
        ranks.on_rank0(self._check_disk)
        for number in SIGNALS:
            if (
                number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
            ):  # nohup ignores it: the run is to go on without the terminal
                signal.signal(number, self._note_signal)

    def _note_signal(self, number: int, _: Any) -> None:
        self.stop = float(number)
        ranks.asked_to_stop.set()

    def _check_disk(self) -> None:
        checkpoint_files.remove_leftovers(self.folder)
        needed = sum(
            3 * 4 * math.prod(shape) for shape in shapes(self.engine).values()
        )  # fp32 weights and Adam's two states
        free = shutil.disk_usage(self.run.folder).free + self.run.overwritten_bytes()
        if self.saves and free < needed:
            raise UserError(
                f"a checkpoint takes about {needed / 1e9:,.2f} GB, but {display_path(self.run.folder)} is on a disk with {free / 1e9:,.2f} GB free; "
                "free some, or give a --run_dir elsewhere"
            )

    def restore(self) -> int:
        """Go on from the checkpoint that --resume found, if there is one, else begin anew. Returns the number of steps done before.

        Until here nothing in the run folder has changed that a start which is refused would spoil.
        """
        if self.run.checkpoint is None:
            self.run.begin()
            return 0
        folder, manifest = self.run.checkpoint
        data = self._data()
        if manifest["rows"] != self.run.rows or manifest.get("data", data) != data:
            gives = f"{self.run.rows:,}" if manifest["rows"] != self.run.rows else "others, though as many"
            raise UserError(
                f"{display_path(folder)} was trained on {manifest['rows']:,} rows, but dataset {self.cfg.dataset} now gives {gives}; "
                "resume with the same data, or start a new run"
            )
        if manifest["step"] > self.run.total_steps:
            raise UserError(
                f"{display_path(folder)} is beyond the {self.run.total_steps} steps that this run is to have; give a larger --max_steps or --epochs"
            )
        self._load(folder, manifest)
        self.run.skipped_steps = manifest["skipped_steps"]
        ranks.on_rank0(lambda: checkpoint_files.put_newer_aside(folder))
        self.run.begin()
        best = ranks.on_rank0(self._find_best)
        self.best_score = best[1]["score"] if best else -math.inf
        return int(manifest["samples"]) // int(self.cfg.batch_size)

    def _data(self) -> str | None:
        """What tells the rows' content apart, if they come from load_rows."""
        return self.run.splits.fingerprint if self.run.splits is not None else None

    def _load(self, folder: Path, manifest: dict[str, Any]) -> None:
        checkpoint_files.read(folder, manifest, self.engine)
        schedule = self.schedule
        schedule.load_state_dict(manifest["schedule"])
        # The rate of the next step, computed anew: with another max_steps the schedule is another one.
        schedule._last_lr = [
            rate * factor(schedule.last_epoch)
            for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.engine.basic_optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        scaler = loss_scaler(self.engine)
        for name in LOSS_SCALE:
            if name in manifest["loss_scale"] and hasattr(scaler, name):
                setattr(scaler, name, manifest["loss_scale"][name])
        self.engine.global_steps = manifest["step"]
        self.engine.global_samples = manifest["samples"]
        self.engine.micro_steps = manifest["step"] * self.engine.gradient_accumulation_steps()
        self.engine.skipped_steps = manifest["skipped_steps"]

    def score(self, step: int, value: float) -> None:
        """Note what the model scored after `step` on the validation rows; higher is better."""
        self.step_score = (step, value if math.isfinite(value) else -math.inf)

    def end_step(self, step: int, micro_batches: list[dict[str, torch.Tensor]]) -> None:
        """After each step, by every rank. Saves when it is due.

        Raises UserError at a step whose loss or gradient is not finite (DeepSpeed has then left the weights as they were), unless
        such steps are skipped, and Stopped after a signal or at the time limit; the state is saved before either.
        """
        if not self.engine.was_step_applied():
            self._not_applied(step, micro_batches)
        # Rank 0 decides what depends on a clock or a score; a signal may come to any rank.
        now, decides = time.monotonic(), ranks.rank() == 0
        if decides and self.cfg.time_limit is not None and (now - self.run.started) / 60 >= self.cfg.time_limit:
            self.stop = self.stop or TIME_LIMIT
        due = decides and self.cfg.save_minutes is not None and (now - self.saved_at) / 60 >= self.cfg.save_minutes
        best = decides and self.cfg.keep_best and self.step_score[0] == step and self.step_score[1] > self.best_score
        flushing = self.flush is not None and self.flush.is_alive()
        stop, due_now, best_now, flushing_somewhere = ranks.largest(
            [self.stop, float(due), float(best), float(flushing)]
        )
        if not flushing_somewhere:
            self.wait_for_flush()
        last = step == self.run.total_steps
        by_steps = self.cfg.save_every is not None and step % self.cfg.save_every == 0
        saved = True
        if due_now or by_steps or best_now or (stop and not last) or (last and self.saves):
            saved = self.save(step)
        if stop or last:
            self.wait_for_flush()
        if stop and not last:
            why = "the time limit" if stop == TIME_LIMIT else signal.Signals(int(stop)).name
            how = f"--run_dir {display_path(self.run.folder)} --resume goes on"
            kept = f"saved; {how}" if saved else f"NOT saved; {how} from an earlier checkpoint, if there is one"
            self.run.close()
            raise Stopped(f"stopped by {why} after step {step}/{self.run.total_steps}: {kept}", STOPPED if saved else 1)

    def save(self, step: int) -> bool:
        """Write a checkpoint of the state after `step`. False if it did not succeed."""
        self.wait_for_flush()
        with self.run.no_step():
            return self._save(step)

    def _save(self, step: int) -> bool:
        started = time.monotonic()
        scaler = loss_scaler(self.engine)
        facts = {
            "recipe": self.run.recipe,
            "step": step,
            "samples": step * self.cfg.batch_size,  # the position in the data, whatever the number of ranks
            "rows": self.run.rows,
            "data": self._data(),
            "skipped_steps": self.run.skipped_steps,
            "score": self.step_score[1] if self.step_score[0] == step and math.isfinite(self.step_score[1]) else None,
            "seconds": round(self.run.seconds(), 1),
            "stage": stage_of(self.run.ds_config),
            "schedule": self.schedule.state_dict(),
            "loss_scale": {name: getattr(scaler, name) for name in LOSS_SCALE if hasattr(scaler, name)},
            "settings": dataclasses.asdict(self.cfg),
            "versions": versions(),
        }
        problem = checkpoint_files.write(self.folder, self.engine, facts)
        self.saved_at = time.monotonic()
        if problem is not None:
            kept = ranks.on_rank0(lambda: [folder.name for folder, _ in checkpoint_files.list_complete(self.folder)])
            newest = f"the newest is {kept[0]}" if kept else "there is none yet"
            self.run.say(f"warning: no checkpoint of step {step}: {problem}; {newest}, training goes on")
            return False
        if self.step_score[0] == step:
            self.best_score = max(self.best_score, self.step_score[1])
        self.flush = checkpoint_files.Flush(self.folder / checkpoint_files.folder_of(step))
        self.run.say(f"step {step}/{self.run.total_steps}  saved in {self.saved_at - started:.1f} s")
        return True

    def wait_for_flush(self) -> None:
        """Until the newest checkpoint is on the disk; then delete those that are no longer to be kept. Every rank must call it."""
        if self.flush is None:
            return
        with self.run.no_step():
            flush, self.flush = self.flush, None
            problem = ranks.first_problem_of(flush.outcome)
            if problem is None:
                ranks.on_rank0(self._delete_old)
            else:  # its checksums will tell whether it is whole; until then nothing older is deleted
                self.run.say(
                    f"warning: {flush.paths[0].parent.name} may not have reached the disk: {problem}; the older checkpoints stay"
                )

    def _delete_old(self) -> None:
        complete = checkpoint_files.list_complete(self.folder)
        best = self._find_best()
        for folder, _ in complete[self.cfg.keep_checkpoints :]:
            if best is None or folder != best[0]:
                problem = checkpoint_files.remove(folder)
                if problem is not None and folder not in self.undeletable:
                    self.undeletable.add(folder)
                    self.run.say(f"warning: {display_path(folder)} cannot be deleted: {problem}; training goes on")

    def _find_best(self) -> tuple[Path, dict[str, Any]] | None:
        """With keep_best, the checkpoint with the best score, if any has one."""
        scored = [
            (folder, manifest)
            for folder, manifest in checkpoint_files.list_complete(self.folder)
            if manifest["score"] is not None
        ]
        return max(scored, key=lambda found: found[1]["score"]) if scored and self.cfg.keep_best else None

    def take_best(self) -> None:
        """With keep_best, bring the engine to the checkpoint with the best score, for the export and the test. Every rank must call it."""
        best = ranks.on_rank0(self._find_best)
        if best is None:
            return
        folder, manifest = best
        problem = checkpoint_files.damage(folder, manifest)
        if problem is not None:
            raise UserError(
                f"the best checkpoint, {display_path(folder)}, is damaged: {problem}; --resume --keep_best false exports the last weights"
            )
        self._load(folder, manifest)
        self.run.say(f"best     {folder.name}, validation score {manifest['score']:.4f}")

    def _not_applied(self, step: int, micro_batches: list[dict[str, torch.Tensor]]) -> None:
        """DeepSpeed found a gradient that is not finite and left the weights alone: skip the step, or stop and keep the evidence."""
        loss = self.run.loss_of(step)
        if math.isfinite(loss) and self.cfg.precision == "fp16":
            self.run.skipped_steps += 1  # how the loss scale is found
            return
        what = f"the loss is {loss}" if not math.isfinite(loss) else "the norm of the gradient is not finite"
        if self.cfg.not_finite == "skip":
            self.run.skipped_steps += 1
            self.run.say(
                f"step {step}/{self.run.total_steps}  skipped: {what} ({self.run.skipped_steps} skipped so far)"
            )
            return
        evidence = self.run.folder / f"not_finite-step-{step:08d}"
        tensors = {
            f"{number}/{name}": tensor.clone()
            for number, batch in enumerate(micro_batches)
            for name, tensor in batch.items()
        }
        with contextlib.suppress(OSError, SafetensorError):  # a full disk must not hide what the matter is
            evidence.mkdir(exist_ok=True)
            save_file(tensors, evidence / f"batch-rank-{ranks.rank():05d}.safetensors")
        before = self.folder / checkpoint_files.folder_of(step - 1)
        saved = (
            step == 1 or ranks.on_rank0(before.exists) or self.save(step - 1)
        )  # the weights as they were before this step, and are
        self.wait_for_flush()
        if ranks.rank() == 0:
            facts = {"step": step, "what": what, "learning_rate": self.schedule.get_last_lr()[0], "state_before": saved}
            with contextlib.suppress(OSError):
                (evidence / "report.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        raise UserError(
            f"{what} at step {step}; the weights are still those of step {step - 1}, the batch is in {display_path(evidence)}; go on from before it with "
            "--resume --not_finite skip, or start anew with a lower learning_rate or --precision fp32"
        )

"""The checkpoints of one run: when one is written, which are kept, and how training goes on from one."""

import contextlib
import copy
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lib.distributed import ranks
from lib.distributed.zero_state import frozen_size, loss_scaler, shapes
from lib.errors import UserError, display_path
from lib.run import checkpoint_files
from lib.run.checkpoint_files import Manifest
from lib.run.checkpoint_writing import HostCopies, WrittenBeside
from lib.run.metrics import Metrics
from lib.run.output import Output
from lib.run.resume import Checkpoint

LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what fp16's loss scaler changes


class Pauses:
    """How long training waits for checkpoints."""

    def __init__(self, metrics: Metrics):
        self.metrics = metrics
        self._seconds = 0.0
        self._first_at: float | None = None  # when the first was begun
        self._is_noted = False

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """For what training waits for. Every rank must enter it."""
        started = time.monotonic()
        self.metrics.interrupt()
        yield
        self._seconds += time.monotonic() - started

    def note(self, output: Output) -> None:
        """Before each save: say, once, that those before took more than a twentieth of the time."""
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
        elif self._seconds > max(1, 0.05 * (now - self._first_at)) and not self._is_noted:  # nobody minds a second
            self._is_noted = True
            output.say(
                f"note: training has waited for checkpoints {self._seconds / (now - self._first_at):.0%} of its time; "
                "save less often (--save_every, --save_minutes)"
            )


class Checkpoints:
    """The checkpoints in <run folder>/checkpoints. Made after deepspeed.initialize, by every rank.

    facts: what a manifest says of the run and its data after a step, beside the engine's state. Every rank calls it.
    """

    def __init__(
        self,
        cfg: Any,
        engine: Any,
        run_folder: Path,
        metrics: Metrics,
        output: Output,
        *,
        facts: Callable[[int], Manifest],
    ):
        self.cfg, self.engine = cfg, engine
        self.folder = run_folder / "checkpoints"
        self.metrics, self.output, self.facts = metrics, output, facts
        self.saves = cfg.save_every is not None or cfg.save_minutes is not None
        self._saved_at = time.monotonic()  # the clock of rank 0 decides
        self._pauses = Pauses(metrics)
        self._copies = HostCopies()
        self._writing: WrittenBeside | None = None  # the newest checkpoint, until it is on the disk
        self._step_score: tuple[int, float] = (0, -math.inf)  # (step, score) of the last evaluation
        self._best_score = -math.inf
        self._undeletable: set[Path] = set()  # old checkpoints, each warned of once

    def prepare(self, freed_bytes: int) -> None:
        """Before training, on rank 0: remove what killed runs left, and refuse a disk without room for a checkpoint.

        freed_bytes: the room that will be free when the run that this one overwrites is deleted.
        """
        checkpoint_files.remove_leftovers(self.folder)
        # fp32 weights and Adam's two states
        needed = sum(3 * 4 * math.prod(shape) for shape in shapes(self.engine).values())
        free = shutil.disk_usage(self.folder.parent).free + freed_bytes
        if self.saves and free < needed:
            raise UserError(
                f"a checkpoint takes about {needed / 1e9:,.2f} GB, but {display_path(self.folder.parent)} is on a disk "
                f"with {free / 1e9:,.2f} GB free; free some, or give a --run_dir elsewhere"
            )

    def resume(self, checkpoint: Checkpoint) -> int:
        """Go on from a checkpoint that fits this run.

        Returns the number of steps done before. Every rank must call it.
        """
        folder, manifest = checkpoint
        load(folder, manifest, self.engine)
        self.metrics.skipped_steps = manifest["skipped_steps"]
        ranks.on_rank0(lambda: checkpoint_files.put_newer_aside(folder))
        self._note_best()
        return int(manifest["samples"]) // int(self.cfg.batch_size)

    def note_score(self, step: int, score: float) -> None:
        """What the model scored after `step` on the validation rows; higher is better."""
        self._step_score = (step, score if math.isfinite(score) else -math.inf)

    def is_due_by_time(self) -> bool:
        minutes = (time.monotonic() - self._saved_at) / 60
        return self.cfg.save_minutes is not None and minutes >= self.cfg.save_minutes

    def is_best(self, step: int) -> bool:
        """Whether, with keep_best, the model has just scored higher than ever."""
        scored_at, score = self._step_score
        return self.cfg.keep_best and scored_at == step and score > self._best_score

    def is_writing(self) -> bool:
        """Whether this rank is still writing the newest checkpoint."""
        return self._writing is not None and self._writing.is_busy()

    def save(self, step: int) -> None:
        """Begin a checkpoint of the state after `step`; `finish` ends it. Every rank must call it."""
        self.finish()
        self._pauses.note(self.output)
        with self._pauses.pause():
            self._saved_at = time.monotonic()
            scored_at, score = self._step_score
            facts = self.facts(step) | {
                "step": step,
                "samples": step * self.cfg.batch_size,  # the position in the data, whatever the number of ranks
                "skipped_steps": self.metrics.skipped_steps,
                "score": score if scored_at == step and math.isfinite(score) else None,
                "seconds": round(self.metrics.seconds(), 1),
                **counters(self.engine),
            }
            self._writing = WrittenBeside(self.folder, self.engine, facts, self._copies)
            if scored_at == step:
                self._best_score = max(self._best_score, score)

    def finish(self) -> bool:
        """Wait until the newest checkpoint is on the disk, and delete those that are not to be kept.

        Returns whether it is whole. Every rank must call it.
        """
        if self._writing is None:
            return True
        with self._pauses.pause():
            writing, self._writing = self._writing, None
            problem = writing.finish()
            if problem is None:
                ranks.on_rank0(self._delete_old)
        step = f"step {writing.step}/{self.metrics.total_steps}"
        if problem is None:
            self.output.say(f"{step}  saved in {time.monotonic() - self._saved_at:.1f} s")
            return True
        kept = ranks.on_rank0(lambda: [path.name for path, _ in checkpoint_files.scores_of(self.folder)])
        newest = f"the newest is {kept[0]}" if kept else "there is none yet"
        self.output.say(f"warning: no checkpoint of step {writing.step}: {problem}; {newest}, training goes on")
        self._note_best()
        return False

    def _delete_old(self) -> None:
        best = self._find_best()
        for folder, _ in checkpoint_files.scores_of(self.folder)[self.cfg.keep_checkpoints :]:
            if best is None or folder != best[0]:
                problem = checkpoint_files.remove(folder)
                if problem is not None and folder not in self._undeletable:
                    self._undeletable.add(folder)
                    self.output.say(f"warning: {display_path(folder)} cannot be deleted: {problem}; training goes on")

    def _note_best(self) -> None:
        best = ranks.on_rank0(self._find_best)
        self._best_score = best[1] if best else -math.inf

    def _find_best(self) -> tuple[Path, float] | None:
        """With keep_best, (folder, score) of the checkpoint with the best score, if any has one."""
        complete = checkpoint_files.scores_of(self.folder) if self.cfg.keep_best else []
        scored = [(folder, score) for folder, score in complete if score is not None]
        return max(scored, key=lambda found: found[1], default=None)

    def take_best(self) -> None:
        """With keep_best, bring the engine to the best checkpoint, for the export and the test.

        Every rank must call it.
        """
        best = ranks.on_rank0(self._find_best)
        if best is None:
            return
        folder, score = best
        problem, manifest = checkpoint_files.read_whole(folder)
        if problem is not None:
            raise UserError(
                f"the best checkpoint, {display_path(folder)}, is damaged: {problem}; "
                "--resume --keep_best false exports the last weights"
            )
        load(folder, manifest, self.engine)
        self.output.say(f"best     {folder.name}, validation score {score:.4f}")


def counters(engine: Any) -> Manifest:
    """What a checkpoint keeps of the engine beside weights and optimizer states, for `load`."""
    scaler = loss_scaler(engine)
    return {
        "schedule": copy.deepcopy(engine.lr_scheduler.state_dict()),
        "loss_scale": {name: getattr(scaler, name) for name in LOSS_SCALE if hasattr(scaler, name)},
    }


def load(folder: Path, manifest: Manifest, engine: Any) -> None:
    """Bring the engine, its schedule and its counters to those of a checkpoint. Every rank must call it."""
    frozen = frozen_size(engine)
    # A model that an adapter has been merged into is rounded otherwise on another kind of CPU.
    if not math.isclose(manifest.get("frozen", frozen), frozen, rel_tol=1e-6):
        raise UserError(
            f"{display_path(folder)} was trained beside other frozen weights than the model has now; "
            "set them back, or start a new run"
        )
    checkpoint_files.read(folder, manifest, engine)
    schedule, scaler = engine.lr_scheduler, loss_scaler(engine)
    # What it has for each group of parameters is as here: expert parallelism has more groups.
    of_groups = {name: value for name, value in schedule.state_dict().items() if isinstance(value, list)}
    schedule.load_state_dict(manifest["schedule"] | of_groups)
    # The rate of the next step, computed anew: with another max_steps the schedule is another one.
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    schedule._last_lr = [rate * factor for rate, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, rate in zip(engine.basic_optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    for name in LOSS_SCALE:
        if name in manifest["loss_scale"] and hasattr(scaler, name):
            setattr(scaler, name, manifest["loss_scale"][name])
    engine.global_steps = manifest["step"]
    engine.global_samples = manifest["samples"]
    engine.micro_steps = manifest["step"] * engine.gradient_accumulation_steps()
    engine.skipped_steps = manifest["skipped_steps"]

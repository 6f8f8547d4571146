"""The figures of a run: metrics.jsonl, DeepSpeed's monitors, the progress on the console, and how long steps take."""

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from lib.distributed import ranks, waits
from lib.run.output import Output
from lib.run.slowest import SlowestRank


class Metrics:
    """One record per optimizer step and one per evaluation. Every rank makes it; rank 0 writes.

    Nothing is read from the device until `log_every` steps are written together.
    """

    def __init__(self, folder: Path, log_every: int, output: Output, *, started: float, seconds_before: float):
        """started: of this run, on time.monotonic's clock. seconds_before: what earlier starts took."""
        self.file, self.log_every, self.output = folder / "metrics.jsonl", log_every, output
        self.started, self.seconds_before = started, seconds_before
        self.total_steps = 0
        self.skipped_steps = 0  # which changed no weight, because a loss or gradient was not finite
        self.step_seconds = 0.0  # of all steps of this start, as far as they are written
        self.monitor: Any = None  # DeepSpeed's, if the JSON turns one on
        self._steps_timed = 0
        self._is_interrupted = False  # whether something that is no step was done since the last one
        self._pending: list[dict[str, Any]] = []  # records of steps since the last flush, losses still on the device
        self._figures: list[str] = []  # names of what a step's record has beside what every recipe logs
        self._unwritten: list[str] = []  # lines for which there was no room on the disk
        self._slowest = SlowestRank(output)
        self._unseen: list[tuple[float, int, float]] = []  # (loss, tokens, seconds) since progress was last shown

    def seconds(self) -> float:
        """How long the run has taken until now, earlier starts included as far as a checkpoint was resumed."""
        return time.monotonic() - self.started + self.seconds_before

    def minutes_of_this_start(self) -> float:
        return (time.monotonic() - self.started) / 60

    # What is no step must not count as one's time.

    def restart_clock(self) -> None:
        """Leave what was done until now out of the time of the next step."""
        waits.begin()
        self._flushed_at = time.perf_counter()
        self._is_interrupted = False

    def interrupt(self) -> None:
        """Something that is no step begins, and ends before the next step, if there is one. Every rank must call it."""
        self.flush()
        waits.end()
        self._is_interrupted = True

    def end_interruption(self) -> None:
        if self._is_interrupted:
            self.restart_clock()

    # Steps.

    def note_step(
        self, step: int, *, loss: torch.Tensor, tokens: torch.Tensor, learning_rate: float, grad_norm: Any,
        **figures: torch.Tensor,
    ) -> None:  # fmt: skip
        """loss and figures: this rank's shares, summed over ranks when they are written. tokens: over all ranks."""
        record = {"step": step, "loss": loss, "tokens": tokens, "learning_rate": learning_rate, "grad_norm": grad_norm}
        self._figures = list(figures)  # the same at each step
        record |= figures
        self._pending.append(record)
        self.output.count_step()
        if step % self.log_every == 0:
            self.flush()

    def loss_of(self, step: int) -> float:
        """The loss of a step noted just now, summed over ranks. Every rank must call it. It waits for the device."""
        self.flush()
        last_step, loss = self._last_loss
        assert last_step == step
        return loss

    def flush(self) -> None:
        """Write the steps since the last time. Every rank must call it."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        shares = torch.stack([record["loss"].detach().float() for record in pending])
        losses = ranks.all_sum(shares).tolist()  # waits for the device
        tokens = torch.stack([record["tokens"] for record in pending]).tolist()
        for name in self._figures:
            for record, total in zip(pending, ranks.all_sum(torch.stack([r[name] for r in pending])), strict=True):
                record[name] = total.tolist()
        now = time.perf_counter()
        step_seconds = (now - self._flushed_at) / len(pending)
        self.step_seconds += now - self._flushed_at
        self._steps_timed += len(pending)
        for record, loss, count in zip(pending, losses, tokens, strict=True):
            record |= {"loss": loss, "tokens": int(count), "step_seconds": step_seconds}
            record["tokens_per_second"] = round(count / step_seconds, 1)
            record["tokens_per_second_per_device"] = round(count / step_seconds / ranks.world_size(), 1)
            record["grad_norm"] = None if record["grad_norm"] is None else float(record["grad_norm"])
        self._last_loss = pending[-1]["step"], losses[-1]
        self._write(pending)
        self._unseen += [(loss, count, step_seconds) for loss, count in zip(losses, tokens, strict=True)]
        self._show_progress(pending[-1]["step"], len(pending))
        self._slowest.note(pending[-1]["step"], len(pending), step_seconds * len(pending))
        self._flushed_at = time.perf_counter()

    def _show_progress(self, step: int, new_steps: int) -> None:
        """The mean loss since progress was last shown, the speed, and the time left of the steps alone."""
        if not self.output.wants_progress(step, new_steps, self.total_steps):
            return
        losses, tokens, seconds = zip(*self._unseen, strict=True)
        finite = [loss for loss in losses if math.isfinite(loss)] or [math.nan]
        left = int(self.step_seconds / self._steps_timed * (self.total_steps - step))
        speed = f"{sum(tokens) / sum(seconds):,.0f} tokens/s  {left // 60}:{left % 60:02d} left"
        figures = f"loss {sum(finite) / len(finite):.4f}  {speed}"
        self._unseen = []
        self.output.show_progress(step, new_steps, self.total_steps, figures)

    # Scores.

    def write_scores(self, step: int, split: str, scores: dict[str, float]) -> None:
        """Write and say the scores of an evaluation, which are the same on all ranks."""
        self.interrupt()
        self._write([{"step": step} | {f"{split}_{name}": value for name, value in scores.items()}])
        listed = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        self.output.say(f"step {step}/{self.total_steps}  {split}: {listed}")

    def _write(self, records: list[dict[str, Any]]) -> None:
        if ranks.rank() != 0:
            return
        for record in records:  # JSON has no NaN
            record |= {k: None for k, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
        was_full = bool(self._unwritten)
        self._unwritten += [json.dumps(record) + "\n" for record in records]
        size = None
        try:
            size = self.file.stat().st_size if self.file.exists() else 0
            with self.file.open("a", encoding="utf-8") as file:
                file.writelines(self._unwritten)
            self._unwritten = []
        except OSError as error:  # training goes on, and they are written when there is room
            if not was_full:  # said once, not at every step
                self.output.say(f"warning: metrics.jsonl cannot be written now: {error.strerror or error}")
            with contextlib.suppress(OSError):
                if size is not None:
                    os.truncate(self.file, size)
        if self.monitor is not None:
            events = [(k, value, record["step"]) for record in records for k, value in record.items()]
            try:
                self.monitor.write_events([event for event in events if isinstance(event[1], float)])
            except OSError as error:
                last = records[-1]["step"]
                self.output.say(f"warning: the monitor misses events until step {last}: {error.strerror or error}")

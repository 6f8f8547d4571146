"""The run: its folder, its log, what is seen on the console, and metrics.jsonl.

A run folder holds config.yaml, ds_config.json, versions.json, log.txt (everything that libraries print), metrics.jsonl, monitor
events if asked for, the exported model, and last result.json, which says that the run ended well and with what scores.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from lib import ranks
from lib.config import UserError, shown
from lib.ds_config import offload_device, stage_of

PLAIN_LINES = 10  # progress lines of a whole run where the output is no terminal
VERSIONS_OF = ("deepspeed", "torch", "transformers", "datasets", "tokenizers", "accelerate", "numpy")


class Run:
    """One training run. Made after ranks.init(); every rank makes it and calls the same methods in the same order."""

    def __init__(self, cfg: Any, ds_config: dict[str, Any], recipe: str):
        self.cfg, self.ds_config = cfg, ds_config
        self.started = time.time()
        self.folder = Path(ranks.on_rank0(lambda: self._make_folder(recipe)))
        self.folder.mkdir(parents=True, exist_ok=True)  # on machines that do not share rank 0's disk
        self._send_chatter_to_log()
        for section in ("tensorboard", "csv_monitor"):
            if ds_config.get(section, {}).get("enabled"):
                ds_config[section] = {"output_path": str(self.folder), "job_name": section, **ds_config[section]}
        os.environ.setdefault("WANDB_DIR", str(self.folder))
        self.total_steps = 0
        self._pending: list[dict[str, Any]] = []  # one a step since the last flush, losses still on the device
        self._unseen: list[tuple[float, int, float]] = []  # (loss, tokens, seconds) of the steps since progress was last shown
        self._bar: tqdm[Any] | None = None
        self._monitor: Any = None

    def _make_folder(self, recipe: str) -> str:
        cfg, name = self.cfg, Path(recipe).stem
        config_name = f"zero{stage_of(self.ds_config)}" + ("_offload" if offload_device(self.ds_config, "optimizer") != "none" else "")
        folder = Path(cfg.run_dir or f"runs/{name}-{config_name}-{time.strftime('%Y%m%d-%H%M%S')}")
        if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
            if not cfg.overwrite:
                raise UserError(f"run_dir {shown(folder)} exists already; give another --run_dir, or --overwrite true to delete what is there")
            if not (folder / "config.yaml").is_file():
                raise UserError(f"run_dir {shown(folder)} is not the folder of a run (it has no config.yaml); nothing was deleted")
            shutil.rmtree(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False, allow_unicode=True), encoding="utf-8")
            (folder / "ds_config.json").write_text(json.dumps(self.ds_config, indent=2) + "\n", encoding="utf-8")
            versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in VERSIONS_OF}
            (folder / "versions.json").write_text(json.dumps(versions, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"run_dir {shown(folder)} cannot be written: {error.strerror or error}") from None
        return str(folder)

    def _send_chatter_to_log(self) -> None:
        """From here on, what anything in this process prints goes to log.txt; the console is for `say` and the progress."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._stdout, self._stderr = os.dup(1), os.dup(2)
        self._console = os.fdopen(os.dup(1), "w", buffering=1)
        self._log = os.open(self.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(self._log, 1)
        os.dup2(self._log, 2)
        transformers_logging.disable_progress_bar()

    def say(self, text: str = "") -> None:
        """Print on rank 0's console."""
        if ranks.rank() == 0:
            if self._bar is not None:
                self._bar.clear()
            print(text, file=self._console, flush=True)

    def header(self, model: torch.nn.Module, rows: dict[str, int], notes: list[str] | None = None) -> None:
        """Say what is about to run. rows: their number by split."""
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        cfg, micro = self.cfg, self.ds_config["train_micro_batch_size_per_gpu"]
        accumulation, world = self.ds_config["gradient_accumulation_steps"], ranks.world_size()
        offloaded = [what for what in ("optimizer", "param") if offload_device(self.ds_config, what) != "none"]
        offload = f", offloaded: {', '.join('parameters' if what == 'param' else what for what in offloaded)}" if offloaded else ""
        device = get_accelerator().device_name(0) if get_accelerator().device_name() != "cpu" else f"CPU, {torch.get_num_threads()} threads a rank"
        lines = {
            "model": f"{type(model).__name__}, {parameters / 1e6:.1f} M parameters",
            "data": f"{cfg.dataset}: " + ", ".join(f"{count:,} {split}" for split, count in rows.items()),
            "device": f"{world} rank{'s' if world > 1 else ''} x {device}",
            "memory": f"ZeRO stage {stage_of(self.ds_config)}{offload}, {cfg.precision}",
            "batch": f"{cfg.batch_size} = {micro} rows x {accumulation} accumulation steps x {world} ranks; {self.total_steps} steps",
            "run": shown(self.folder),
        }
        for name, value in lines.items():
            self.say(f"{name:<9}{value}")
        for note in notes or []:
            self.say(f"note     {note}")

    def attach(self, engine: Any) -> None:
        """Let DeepSpeed's monitors (TensorBoard, W&B, CSV), where the JSON turns them on, receive what is logged."""
        self._monitor = engine.monitor if engine.monitor.enabled else None

    def steps(self) -> Iterator[int]:
        """1 ... total_steps, with a progress bar on a terminal, or a line every so often."""
        if ranks.rank() == 0 and self._console.isatty():
            self._bar = tqdm(total=self.total_steps, file=self._console, unit="step", dynamic_ncols=True, leave=True)
        self._loop_started = self._flushed_at = time.perf_counter()
        yield from range(1, self.total_steps + 1)
        self._flush()
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def log_step(self, step: int, loss: torch.Tensor, tokens: torch.Tensor, learning_rate: float, grad_norm: Any) -> None:
        """Note one optimizer step. Nothing is read from the device until `log_every` steps are written together.

        loss: this rank's share, summed over ranks here. tokens: over all ranks. grad_norm: before clipping, or None.
        """
        self._pending.append({"step": step, "loss": loss, "tokens": tokens, "learning_rate": learning_rate, "grad_norm": grad_norm})
        if step % self.cfg.log_every == 0:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        losses = ranks.all_sum(torch.stack([entry["loss"].detach().float() for entry in pending])).tolist()  # waits for the device
        tokens = torch.stack([entry["tokens"] for entry in pending]).tolist()
        now = time.perf_counter()
        step_seconds = (now - self._flushed_at) / len(pending)
        for entry, loss, count in zip(pending, losses, tokens, strict=True):
            entry |= {"loss": loss, "tokens": int(count), "step_seconds": step_seconds}
            entry["grad_norm"] = None if entry["grad_norm"] is None else float(entry["grad_norm"])
        self._write(pending)
        for entry, loss in zip(pending, losses, strict=True):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at step {entry['step']}; see {shown(self.folder / 'metrics.jsonl')}, and try a lower learning_rate or precision fp32"
                )
        self._unseen += [(loss, count, step_seconds) for loss, count in zip(losses, tokens, strict=True)]
        self._show_progress(pending[-1]["step"], len(pending))
        self._flushed_at = time.perf_counter()

    def _show_progress(self, step: int, since_last: int) -> None:
        """On a terminal move the bar, elsewhere print a line at each tenth of the run; the loss is the mean since the last time."""
        if ranks.rank() != 0:
            return
        next_line = step * PLAIN_LINES // self.total_steps > (step - since_last) * PLAIN_LINES // self.total_steps
        if self._bar is None and not next_line:
            return
        losses, tokens, seconds = (sum(column) for column in zip(*self._unseen, strict=True))
        shown_now = f"loss {losses / len(self._unseen):.4f}  {tokens / seconds:,.0f} tokens/s"
        self._unseen = []
        if self._bar is not None:
            self._bar.set_postfix_str(shown_now, refresh=False)
            self._bar.update(since_last)
        else:
            left = int((time.perf_counter() - self._loop_started) / step * (self.total_steps - step))
            self.say(f"step {step}/{self.total_steps}  {shown_now}  {left // 60}:{left % 60:02d} left")

    def _write(self, entries: list[dict[str, Any]]) -> None:
        if ranks.rank() != 0:
            return
        for entry in entries:  # JSON has no NaN
            entry |= {name: None for name, value in entry.items() if isinstance(value, float) and not math.isfinite(value)}
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
        if self._monitor is not None:
            self._monitor.write_events([
                (name, value, entry["step"]) for entry in entries for name, value in entry.items() if isinstance(value, float)
            ])  # fmt: skip

    def due(self, step: int, every: int | None) -> bool:
        """Whether something that is done every so many steps is due. What is due at the last step is left to the end of the run."""
        return bool(every) and step % (every or 1) == 0 and step < self.total_steps

    def log_evaluation(self, step: int, split: str, scores: dict[str, float]) -> None:
        """Note the scores of an evaluation, the same on all ranks, and say them."""
        self._flush()
        self._write([{"step": step} | {f"{split}_{name}": value for name, value in scores.items()}])
        self.say(f"step {step}/{self.total_steps}  {split}: " + "  ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        self._flushed_at = time.perf_counter()  # an evaluation is not part of a step's time

    def finish(self, scores: dict[str, dict[str, float]]) -> None:
        """Say the scores as a table, and write result.json, last: {name of the model or baseline: {score: value}}."""
        names = list(next(iter(scores.values())))
        width = max(len(row) for row in scores)
        self.say()
        self.say(f"{'':<{width}}  " + "  ".join(f"{name:>14}" for name in names))
        for row, values in scores.items():
            self.say(f"{row:<{width}}  " + "  ".join(f"{values[name]:>14.4f}" for name in names))
        seconds = time.time() - self.started
        self.say()
        self.say(f"{shown(self.folder)}: the model in model/, every step in metrics.jsonl; {int(seconds) // 60} min {int(seconds) % 60} s")
        if ranks.rank() == 0:
            result = {"finished": True, "steps": self.total_steps, "seconds": round(seconds, 1), "scores": scores}
            part = self.folder / ".result.json"
            part.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            part.replace(self.folder / "result.json")
        self.close()

    def close(self) -> None:
        """Give the process its own output back."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(self._stdout, 1)
        os.dup2(self._stderr, 2)
        for descriptor in (self._stdout, self._stderr, self._log):
            os.close(descriptor)
        self._console.close()


def total_steps(max_steps: int | None, epochs: float | None, rows: int, batch_size: int) -> int:
    """The number of optimizer steps that the settings `max_steps` and `epochs` ask for; just one of them is given."""
    if (max_steps is None) == (epochs is None):
        raise UserError("set one of max_steps and epochs, and the other to null")
    return max_steps if max_steps is not None else max(1, math.ceil((epochs or 0) * rows / batch_size))

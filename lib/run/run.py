"""The run: its folder, its log, what is seen on the console, and metrics.jsonl.

A run folder holds config.yaml, ds_config.json, versions.json, log.txt (everything that libraries print), metrics.jsonl, checkpoints,
monitor events if asked for, the exported model, and last result.json, which says that the run ended well and with what scores.
"""

import atexit
import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from lib.data.rows import Splits
from lib.distributed import ranks
from lib.errors import Stopped, UserError, did_you_mean, display_path, from_home, new_folder
from lib.progress import Work
from lib.run import checkpoint_files
from lib.run.console import Console
from lib.run.signs import Signs
from lib.settings.ds_config import NOTES, offload_device, stage_of
from lib.settings.run_settings import MAY_CHANGE, NEWER

PLAIN_LINES = 10  # progress lines of a whole run where the output is no terminal
VERSIONS_OF = ("deepspeed", "torch", "transformers", "datasets", "tokenizers", "accelerate", "numpy")

# What a start that failed before training leaves in the run folder: nothing that the next start would miss.
UNTRAINED = {"config.yaml", "ds_config.json", "versions.json", "log.txt"}
IN_USE = ".in-use"  # in the run folder, where the file system has no locks


def versions() -> dict[str, str]:
    """The versions of what a run's numbers depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in VERSIONS_OF}


class Run:
    """One training run. Made after ranks.init(); every rank makes it and calls the same methods in the same order."""

    def __init__(self, cfg: Any, ds_config: dict[str, Any], recipe: str):
        self.cfg, self.ds_config, self.recipe = cfg, ds_config, Path(recipe).stem
        self.started = time.monotonic()
        self._lock: Any = None
        self._old: dict[
            Path, tuple[int, int]
        ] = {}  # what this run overwrites, once it begins: the contents of each folder before the folder; on rank 0
        folder, token, finished, overwrites, facts = ranks.on_rank0(
            lambda: (*self._open_folder(), bool(self._old), self._facts())
        )
        self.folder = Path(folder)
        if finished:
            self._unlock()
            raise Stopped(finished, 0)
        self._check_ranks_agree(token, facts)
        self.notes: list[str] = ds_config.pop(NOTES, [])
        with Signs(Console(1)) if cfg.resume and ranks.rank() == 0 else contextlib.nullcontext():
            self.checkpoint = self._find_checkpoint() if cfg.resume else None  # what --resume goes on from
        self.seconds_before = self.checkpoint[1]["seconds"] if self.checkpoint else 0.0
        if (
            self.checkpoint is None and not overwrites
        ):  # else when it begins: a start that is refused before changes nothing
            ranks.on_rank0(self._write_facts)
        self._send_chatter_to_log(".log.txt" if overwrites else "log.txt")
        for section in ("tensorboard", "csv_monitor"):
            if ds_config.get(section, {}).get("enabled"):
                ds_config[section] = {"output_path": str(self.folder), "job_name": section, **ds_config[section]}
                ds_config[section]["output_path"] = from_home(ds_config[section]["output_path"])
        os.environ.setdefault("WANDB_DIR", str(self.folder))
        self.total_steps = 0
        self.rows = 0  # of the training data
        self.splits: Splits | None = None  # that it is made from
        self.skipped_steps = 0  # which changed no weight, because a loss or gradient was not finite
        self.step_seconds = 0.0  # of all steps of this start, as far as they are written
        self._steps_timed = 0
        self._aside = False  # whether something that is no step was done since the last one
        self._pending: list[dict[str, Any]] = []  # one a step since the last flush, losses still on the device
        self._unwritten: list[str] = []  # lines of metrics.jsonl for which there was no room
        self._unseen: list[
            tuple[float, int, float]
        ] = []  # (loss, tokens, seconds) of the steps since progress was last shown
        self._bar: tqdm[Any] | None = None
        self._monitor: Any = None

    def _facts(self) -> dict[str, Any]:
        """What every rank must have alike."""
        return {**dataclasses.asdict(self.cfg), "the DeepSpeed config": self.ds_config}

    def _check_ranks_agree(self, token: str, facts: dict[str, Any]) -> None:
        """Raise a UserError where a rank, on another machine say, has another run folder or other settings than rank 0."""
        lock = self.folder / ".lock"
        if ranks.first_problem(None if lock.is_file() and lock.read_text(encoding="utf-8") == token else "other"):
            raise UserError(
                f"not every rank sees the same run_dir {display_path(self.folder)}: it must be on a disk that all machines share"
            )
        differs = next(
            (
                f"{name} is {value!r}, on rank 0 {facts[name]!r}"
                for name, value in self._facts().items()
                if value != facts[name]
            ),
            None,
        )
        problem = ranks.first_problem(differs)
        if problem is not None:
            raise UserError(f"{problem}; all machines need the same code, YAML, DeepSpeed JSON and command line")

    def _open_folder(self) -> tuple[str, str, str | None]:
        """Make the run folder, or take the one that is there, and lock it. Returns (folder, what its lock says, why there is nothing to do)."""
        cfg = self.cfg
        if (cfg.max_steps is None) == (cfg.epochs is None):
            raise UserError("set one of max_steps and epochs, and the other to null")
        if cfg.keep_best and cfg.eval_every is None:
            raise UserError("keep_best is true, but eval_every is null, so nothing would be scored; set --eval_every")
        if cfg.resume and cfg.overwrite:
            raise UserError(
                "resume and overwrite are both true: one keeps what is in run_dir, the other deletes it; set one of them"
            )
        if cfg.resume and not cfg.run_dir:
            runs = sorted(Path("runs").glob(f"{self.recipe}-*"), key=lambda run: run.stat().st_mtime)
            raise UserError(
                f"--resume needs --run_dir, the folder of the run to go on with{f'; the newest is {runs[-1]}' if runs else ''}"
            )
        config_name = f"zero{stage_of(self.ds_config)}" + (
            "_offload" if offload_device(self.ds_config, "optimizer") != "none" else ""
        )
        folder = Path(cfg.run_dir or "runs")
        try:
            folder = folder if cfg.run_dir else new_folder(f"runs/{self.recipe}-{config_name}")
            there = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
            untrained = {path.name for path in there} == UNTRAINED and not (cfg.resume or cfg.overwrite)
            if there and not (untrained or cfg.resume or cfg.overwrite):
                raise UserError(
                    f"run_dir {display_path(folder)} exists already; give another --run_dir, --resume to go on with it, or --overwrite to delete what is there"
                )
            if there and not (folder / "config.yaml").is_file():
                raise UserError(
                    f"run_dir {display_path(folder)} is not the folder of a run (it has no config.yaml); nothing was changed"
                )
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / ".lock").open("a+", encoding="utf-8")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"run_dir {display_path(folder)} is in use by another run; wait until it ends, or give another --run_dir"
                ) from None
            except OSError:  # a file system without locks
                _claim(folder / IN_USE)
            if cfg.overwrite:
                self._old = {path: _identity(path) for top in there for path in _contents_first(top)}
            (folder / ".log.txt").unlink(missing_ok=True)  # of a start that was to overwrite this run and failed
            token = f"{platform.node()} {os.getpid()} {time.time()}"
            self._lock.truncate(0)
            self._lock.write(token)
            self._lock.flush()
            os.fsync(self._lock.fileno())  # for the ranks on other machines
        except OSError as error:
            raise UserError(f"run_dir {display_path(folder)} cannot be written: {error.strerror or error}") from None
        return str(folder), token, self._finished_before(folder) if cfg.resume else None

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def overwritten_bytes(self) -> int:
        """How much room there will be when the run that this one overwrites is deleted. For rank 0."""
        return sum(path.lstat().st_size for path in self._old if path.is_file())

    def begin(self) -> None:
        """Data, model and engine are there, and training begins: delete the run that this one overwrites, and write what runs now. Every rank must call it."""
        ranks.on_rank0(self._begin)

    def _begin(self) -> None:
        try:
            (self.folder / "result.json").unlink(missing_ok=True)
            for path, identity in self._old.items():  # but for what a monitor of this run has written meanwhile
                if path.is_dir() and not path.is_symlink():
                    with contextlib.suppress(OSError):  # it is not empty
                        path.rmdir()
                elif (
                    os.path.lexists(path)
                    and _identity(path) == identity
                    and (path.parent != self.folder or path.name not in UNTRAINED)
                ):
                    path.unlink()  # those of UNTRAINED are replaced
            if self._old:
                (self.folder / ".log.txt").replace(self.folder / "log.txt")
        except OSError as error:
            raise UserError(
                f"run_dir {display_path(self.folder)}: what is to be overwritten cannot be deleted: {error.filename}: {error.strerror}"
            ) from None
        self._write_facts()

    def _finished_before(self, folder: Path) -> str | None:
        """Why there is nothing to go on with, if the run in the folder has ended well and is not asked for more steps, or given other data."""
        try:
            steps = json.loads((folder / "result.json").read_text(encoding="utf-8"))["steps"]
            before = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            if any(before.get(name) != getattr(self.cfg, name, None) for name in ("dataset", "max_steps", "epochs")):
                return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError):  # not whole
            return None
        (folder / "result.json").touch()  # a start that found all done has succeeded too
        return f"{display_path(folder)} has finished already, after {steps} steps; a larger --max_steps or --epochs would go on with it"

    def _find_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint of the run, checked against the settings."""
        parent = self.folder / "checkpoints"
        folder, manifest, notes = checkpoint_files.find_newest(parent)
        self.notes += notes
        if folder is None:
            if (self.folder / "result.json").is_file():
                raise UserError(
                    f"{display_path(self.folder)} has finished without a checkpoint to go on from; start a new run with another --run_dir"
                )
            self.notes.append(f"there is no checkpoint in {display_path(parent)}: starting from the first step")
            return None
        if manifest["recipe"] != self.recipe:
            raise UserError(
                f"{display_path(folder)} was made by the recipe {manifest['recipe']}, not {self.recipe}; give that recipe's run another --run_dir"
            )
        here, there = dataclasses.asdict(self.cfg), manifest["settings"]
        there = {name: value for name, value in NEWER.items() if name in here} | there
        for name in {**there, **here}:
            if name in here and name in there and here[name] != there[name]:
                change = f"{name} was {there[name]!r} and is {here[name]!r}"
                if name not in MAY_CHANGE or (name == "dataset" and manifest.get("data") is None):
                    raise UserError(
                        f"{display_path(folder)}: {change}, which would change the result; set it back, or start a new run with another --run_dir"
                    )
                if name == "dataset":
                    self.notes.append(f"{change}: it must have the same rows")
                if name in ("max_steps", "epochs"):
                    self.notes.append(f"{change}: the learning-rate schedule is that of the new length from here on")
            elif name not in MAY_CHANGE and name not in here:
                raise UserError(
                    f"{display_path(folder)} has a setting '{name}' that this recipe does not have{did_you_mean(name, here)}; resume with the code that wrote it"
                )
            elif name not in MAY_CHANGE and name not in there:
                raise UserError(
                    f"{display_path(folder)} lacks the setting '{name}'; resume with the code that wrote it"
                )
        for name, version in versions().items():
            if manifest["versions"].get(name) != version:
                self.notes.append(
                    f"{name} was {manifest['versions'].get(name)} and is {version}: the numbers may differ slightly"
                )
        return folder, manifest

    def _write_facts(self) -> None:
        """config.yaml, ds_config.json, versions.json; and metrics.jsonl without the steps that are to be done again."""
        facts = {
            "versions.json": json.dumps(versions(), indent=2) + "\n",
            "ds_config.json": json.dumps(self.ds_config, indent=2) + "\n",
            # Last: lib/launch/supervise.py sees by it that all is there.
            "config.yaml": yaml.safe_dump(dataclasses.asdict(self.cfg), sort_keys=False, allow_unicode=True),
        }
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():
            done = self.checkpoint[1]["step"] if self.checkpoint else 0
            lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            facts = {"metrics.jsonl": "".join(line for line in lines if _step_of(line) <= done), **facts}
        for name, text in facts.items():
            self._write_file(name, text)

    def _write_file(self, name: str, text: str) -> None:
        """Write a file of the run folder, whole or not at all, whatever happens."""
        part = self.folder / f".{name}"
        try:
            with part.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave the name of the new file and nothing in it
            part.replace(self.folder / name)
        except OSError as error:
            raise UserError(
                f"run_dir {display_path(self.folder)} cannot be written: {error.strerror or error}"
            ) from None

    def _send_chatter_to_log(self, name: str) -> None:
        """From here on, what anything in this process prints goes to log.txt; the console is for `say` and the progress."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._before = sys.stdout, sys.stderr
        self._stdout, self._stderr = os.dup(1), os.dup(2)
        self._console = Console(self._stdout)
        self._log = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(self._log, 1)
        os.dup2(self._log, 2)
        sys.stdout, sys.stderr = Console(1), Console(2)  # which a full disk does not make raise
        transformers_logging.disable_progress_bar()
        self._signs = Signs(self._console) if ranks.rank() == 0 else None
        self._set_phase("starting")

    def _set_phase(self, *phase: Any) -> None:
        """What the console shows after a long silence where nothing says more: the arguments of Work, or nothing."""
        if self._signs is not None:
            self._signs.phase = Work(*phase) if phase else None

    def say(self, text: str = "") -> None:
        """Print on rank 0's console."""
        if self._signs is not None:
            if self._bar is not None:
                self._bar.clear()
            self._signs.print(text)

    def header(self, model: torch.nn.Module, rows: dict[str, int], notes: list[str] | None = None) -> None:
        """Say what is about to run. rows: their number by split."""
        sizes = {parameter: getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters()}
        total, trained = sum(sizes.values()), sum(size for parameter, size in sizes.items() if parameter.requires_grad)
        cfg, micro = self.cfg, self.ds_config["train_micro_batch_size_per_gpu"]
        accumulation, world = self.ds_config["gradient_accumulation_steps"], ranks.world_size()
        offloaded = [what for what in ("optimizer", "param") if offload_device(self.ds_config, what) != "none"]
        offload = (
            f", offloaded: {', '.join('parameters' if what == 'param' else what for what in offloaded)}"
            if offloaded
            else ""
        )
        device = (
            get_accelerator().device_name(0)
            if get_accelerator().device_name() != "cpu"
            else f"CPU, {torch.get_num_threads()} threads a rank"
        )
        lines = {
            "model": f"{type(model).__name__}, {total / 1e6:.1f} M parameters"
            + (f", {trained / 1e6:.1f} M of them trained" if trained < total else ""),
            "data": f"{cfg.dataset}: " + ", ".join(f"{count:,} {split}" for split, count in rows.items()),
            "device": f"{world} rank{'s' if world > 1 else ''} x {device}",
            "memory": f"ZeRO stage {stage_of(self.ds_config)}{offload}, {cfg.precision}",
            "batch": f"{cfg.batch_size} = {micro} rows x {accumulation} accumulation steps x {world} ranks; {self.total_steps} steps",
            "run": display_path(self.folder),
        }
        if self.checkpoint is not None:
            folder, manifest = self.checkpoint
            by = f"written at ZeRO stage {manifest['stage']} by {manifest['world_size']} rank{'s' if manifest['world_size'] > 1 else ''}"
            lines["resume"] = f"after step {manifest['step']} of {folder.name}, {by}"
        if self.splits is not None:
            lines = {"model": lines.pop("model"), "data": lines.pop("data"), **self.splits.header, **lines}
            notes = [*self.splits.notes, *(notes or [])]
        for name, value in lines.items():
            self.say(f"{name:<9}{value}")
        for note in [*self.notes, *(notes or [])]:
            self.say(f"note     {note}")

    def plan(self, rows: int, splits: Splits | None = None) -> None:
        """Set total_steps to what the settings max_steps and epochs ask for on so many training rows; just one of them is given.

        splits: the data that these are made from, which the header shows and a resumed run must have again.
        """
        max_steps, epochs = self.cfg.max_steps, self.cfg.epochs
        self.rows, self.splits = rows, splits
        self.total_steps = (
            max_steps if max_steps is not None else max(1, math.ceil(epochs * rows / self.cfg.batch_size))
        )

    def attach(self, engine: Any) -> None:
        """Let DeepSpeed's monitors (TensorBoard, W&B, CSV), where the JSON turns them on, receive what is logged.

        And let DeepSpeed's own process groups give up, as the others do, on a rank that does not answer.
        """
        self._monitor = engine.monitor if engine.monitor.enabled else None
        ranks.set_timeout(self.cfg.rank_timeout)

    def steps(self, done: int = 0) -> Iterator[int]:
        """done + 1 ... total_steps, with a progress bar on a terminal, or a line every so often.

        Before each step the random generators are seeded by the seed, the step and the rank. So what is random in a step, such as
        dropout, does not depend on what ran before it, and a run that is resumed draws as one that was not interrupted.
        """
        if self._signs is not None and self._console.isatty():
            layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"  # tqdm's own time left would count what is no step
            self._bar = tqdm(
                total=self.total_steps,
                initial=done,
                file=self._console,
                bar_format=layout,
                dynamic_ncols=True,
                leave=True,
            )
            self._signs.bar = self._bar
        self._set_phase(*(() if self._bar is not None else ("training", self.total_steps - done, "steps")))
        self.restart_clock()
        for step in range(done + 1, self.total_steps + 1):
            set_seed(int(np.random.SeedSequence((self.cfg.seed, step, ranks.rank())).generate_state(1)[0]))
            yield step
            if self._aside:
                self.restart_clock()
        self.flush()
        self._set_phase("after the last step")
        if self._signs is not None and self._bar is not None:
            self._signs.bar = None
            self._bar.close()
            self._bar = None

    def log_step(
        self, step: int, loss: torch.Tensor, tokens: torch.Tensor, learning_rate: float, grad_norm: Any
    ) -> None:
        """Note one optimizer step. Nothing is read from the device until `log_every` steps are written together.

        loss: this rank's share, summed over ranks here. tokens: over all ranks. grad_norm: before clipping, or None.
        """
        self._pending.append(
            {"step": step, "loss": loss, "tokens": tokens, "learning_rate": learning_rate, "grad_norm": grad_norm}
        )
        if self._signs is not None and self._signs.phase is not None:
            self._signs.phase.advance(1)
        if step % self.cfg.log_every == 0:
            self.flush()

    def loss_of(self, step: int) -> float:
        """The loss of a step that was logged just now, summed over the ranks: every rank must call it. It waits for the device."""
        self.flush()
        last_step, loss = self._last_loss
        assert last_step == step
        return loss

    def restart_clock(self) -> None:
        """Leave what was done until now out of the time of the next step."""
        self._flushed_at = time.perf_counter()
        self._aside = False

    @contextlib.contextmanager
    def no_step(self) -> Iterator[None]:
        """For what is done between two steps and belongs to neither. Every rank must enter it: the steps before are written, which ends their time."""
        self.flush()
        yield
        self.restart_clock()

    def seconds(self) -> float:
        """How long the run has taken until now, earlier starts included as far as a checkpoint was resumed."""
        return time.monotonic() - self.started + float(self.seconds_before)

    def flush(self) -> None:
        """Write the steps since the last time to metrics.jsonl. Every rank must call it."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        losses = ranks.all_sum(
            torch.stack([entry["loss"].detach().float() for entry in pending])
        ).tolist()  # waits for the device
        tokens = torch.stack([entry["tokens"] for entry in pending]).tolist()
        now = time.perf_counter()
        step_seconds = (now - self._flushed_at) / len(pending)
        self.step_seconds += now - self._flushed_at
        self._steps_timed += len(pending)
        for entry, loss, count in zip(pending, losses, tokens, strict=True):
            entry |= {"loss": loss, "tokens": int(count), "step_seconds": step_seconds}
            entry["grad_norm"] = None if entry["grad_norm"] is None else float(entry["grad_norm"])
        self._last_loss = pending[-1]["step"], losses[-1]
        self._write(pending)
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
        losses, tokens, seconds = zip(*self._unseen, strict=True)
        finite = [loss for loss in losses if math.isfinite(loss)] or [math.nan]
        left = int(self.step_seconds / self._steps_timed * (self.total_steps - step))  # of the steps alone
        shown_now = f"loss {sum(finite) / len(finite):.4f}  {sum(tokens) / sum(seconds):,.0f} tokens/s  {left // 60}:{left % 60:02d} left"
        self._unseen = []
        if self._bar is not None:
            self._bar.set_postfix_str(shown_now, refresh=False)
            self._bar.update(since_last)
        else:
            self.say(f"step {step}/{self.total_steps}  {shown_now}")

    def _write(self, entries: list[dict[str, Any]]) -> None:
        if ranks.rank() != 0:
            return
        for entry in entries:  # JSON has no NaN
            entry |= {
                name: None for name, value in entry.items() if isinstance(value, float) and not math.isfinite(value)
            }
        self._unwritten += [json.dumps(entry) + "\n" for entry in entries]
        metrics = self.folder / "metrics.jsonl"
        size = None
        try:
            size = metrics.stat().st_size if metrics.exists() else 0
            with metrics.open("a", encoding="utf-8") as file:
                file.writelines(self._unwritten)
            self._unwritten = []
        except OSError as error:  # training goes on, and they are written when there is room
            self.say(f"warning: metrics.jsonl cannot be written now: {error.strerror or error}")
            with contextlib.suppress(OSError):
                if size is not None:
                    os.truncate(metrics, size)
        if self._monitor is not None:
            events = [
                (name, value, entry["step"])
                for entry in entries
                for name, value in entry.items()
                if isinstance(value, float)
            ]
            try:
                self._monitor.write_events(events)
            except OSError as error:
                self.say(
                    f"warning: the monitor misses events until step {entries[-1]['step']}: {error.strerror or error}"
                )

    def due(self, step: int, every: int | None) -> bool:
        """Whether an evaluation every so many steps is due: not at the last step, which is tested, unless the best one is looked for.

        Every rank must call it: where it is due, the steps until now are written first, so that no evaluation counts as their time.
        """
        due = every is not None and (self.cfg.keep_best if step == self.total_steps else step % every == 0)
        if due:
            self.flush()
            self._aside = True
        return due

    def log_evaluation(self, step: int, split: str, scores: dict[str, float]) -> None:
        """Note the scores of an evaluation, the same on all ranks, and say them."""
        self.flush()
        self._write([{"step": step} | {f"{split}_{name}": value for name, value in scores.items()}])
        self.say(
            f"step {step}/{self.total_steps}  {split}: "
            + "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        )
        self.restart_clock()

    def finish(self, scores: dict[str, dict[str, float]]) -> None:
        """Say the scores as a table, and write result.json, last: {name of the model or baseline: {score: value}}."""
        names = list(next(iter(scores.values())))
        width = max(len(row) for row in scores)
        self.say()
        self.say(f"{'':<{width}}  " + "  ".join(f"{name:>14}" for name in names))
        for row, values in scores.items():
            self.say(f"{row:<{width}}  " + "  ".join(f"{values[name]:>14.4f}" for name in names))
        self.say()
        if self.skipped_steps:
            self.say(
                f"{self.skipped_steps} of {self.total_steps} steps were skipped: their loss or gradient was not finite"
            )
        seconds = int(self.seconds())
        self.say(
            f"{display_path(self.folder)}: the model in model/, every step in metrics.jsonl; {seconds // 60} min {seconds % 60} s"
        )
        if ranks.rank() == 0:
            known = {
                row: {name: value if math.isfinite(value) else None for name, value in values.items()}
                for row, values in scores.items()
            }
            result = {
                "finished": True,
                "steps": self.total_steps,
                "skipped_steps": self.skipped_steps,
                "seconds": round(self.seconds(), 1),
                "scores": known,
            }
            self._write_file("result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
        self.close()

    def close(self) -> None:
        """Give the process its own output back."""
        if self._signs is not None:
            self._signs.close()
        sys.stdout, sys.stderr = self._before
        os.dup2(self._stdout, 1)
        os.dup2(self._stderr, 2)
        for descriptor in (self._stdout, self._stderr, self._log):
            os.close(descriptor)
        self._unlock()


def _contents_first(path: Path) -> Iterator[Path]:
    """The path and all that is below it, each folder after what it holds; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            yield from _contents_first(inner)
    yield path


def _identity(path: Path) -> tuple[int, int]:
    """What is another one when a file was made anew under the same name."""
    found = path.lstat()
    return found.st_ino, found.st_ctime_ns  # a new file may get the number of the old one


def _claim(file: Path) -> None:
    """Take a run folder where the file system has no locks: by making this file, which only one run can, and which goes with this process.

    What is left of a process of this machine that was killed is taken over. Raises UserError where another run has it.
    """
    me = psutil.Process()
    while True:
        try:
            with file.open("x", encoding="utf-8") as claim:
                json.dump({"host": platform.node(), "process": me.pid, "started": me.create_time()}, claim)
            atexit.register(file.unlink, missing_ok=True)
            return
        except FileExistsError:
            if not _is_stale(file):
                raise UserError(
                    f"run_dir {display_path(file.parent)} is in use by another run, says {display_path(file)} (the file system has no locks): "
                    f"{' '.join(file.read_text(encoding='utf-8').split())}; if that process has ended, delete the file"
                ) from None
            file.unlink(missing_ok=True)


def _is_stale(file: Path) -> bool:
    """Whether the process that made this file has ended, as far as this machine can tell."""
    try:
        claim = json.loads(file.read_text(encoding="utf-8"))
        return claim["host"] == platform.node() and psutil.Process(claim["process"]).create_time() != claim["started"]
    except (psutil.NoSuchProcess, FileNotFoundError):
        return True
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity where a run was killed in the middle of it."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf

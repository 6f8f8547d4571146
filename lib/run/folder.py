"""The run folder: config.yaml, ds_config.json, versions.json, log.txt (and log-<host>.txt of each other machine),
metrics.jsonl, before.json (what the model before training gave, where a recipe needs it), checkpoints, monitor events,
the exported model in model/, and last result.json, which says that the run ended well and with which scores.
"""

import atexit
import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from lib.distributed import ranks
from lib.errors import Stopped, UserError, display_path, new_folder
from lib.run import kept
from lib.run.resume import finished_before, steps_until, versions
from lib.settings.ds_config import offload_device, stage_of

# What a start that failed before training leaves in the run folder: nothing that the next start would miss.
UNTRAINED = {"config.yaml", "ds_config.json", "versions.json", "log.txt"}
IN_USE = ".in-use"  # in the run folder, where the file system has no locks


class RunFolder:
    """The folder of one run, which no other run has until this one ends. Every rank makes it.

    Raises UserError where it cannot be had, and Stopped where --resume finds that the run has finished.
    """

    def __init__(self, cfg: Any, ds_config: dict[str, Any], recipe: str):
        self.cfg, self.ds_config, self.recipe = cfg, ds_config, recipe
        self._lock: Any = None
        # What this run overwrites once it begins: the contents of each folder before the folder. On rank 0.
        self._old: dict[Path, tuple[int, int]] = {}
        path, token, finished = ranks.on_rank0(self._open)
        self.path = Path(path)
        if finished:
            self.unlock()
            raise Stopped(finished, 0)
        facts, self.overwrites = ranks.on_rank0(lambda: (self._facts(), bool(self._old)))
        check_ranks_agree(self.path, token, self._facts(), facts)

    def _facts(self) -> dict[str, Any]:
        """What every rank must have alike."""
        return {**dataclasses.asdict(self.cfg), "the DeepSpeed config": self.ds_config}

    def _open(self) -> tuple[str, str, str | None]:
        """Make the folder, or take the one that is there, and lock it.

        Returns (folder, what its lock says, why there is nothing to do).
        """
        cfg = self.cfg
        check_run_settings(cfg, self.recipe)
        folder = Path(cfg.run_dir or "runs")
        try:
            if not cfg.run_dir:
                offload = "_offload" if offload_device(self.ds_config, "optimizer") != "none" else ""
                folder = new_folder(f"runs/{self.recipe}-zero{stage_of(self.ds_config)}{offload}")
            found = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
            names = {path.name for path in found if not path.match("log-*.txt")}
            untrained = names == UNTRAINED and not (cfg.resume or cfg.overwrite)
            if found and not (untrained or cfg.resume or cfg.overwrite):
                raise UserError(
                    f"run_dir {display_path(folder)} exists already; give another --run_dir, --resume to go on with "
                    "it, or --overwrite to delete what is there"
                )
            if found and not (folder / "config.yaml").is_file():
                raise UserError(
                    f"run_dir {display_path(folder)} is not the folder of a run (it has no config.yaml); "
                    "nothing was changed"
                )
            folder.mkdir(parents=True, exist_ok=True)
            token = self._take_lock(folder)
            if cfg.overwrite:
                self._old = {path: _identity(path) for top in found for path in _contents_first(top)}
            for log in folder.glob(".log*.txt"):  # of a start that was to overwrite this run and failed
                log.unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_be_written(folder, error) from None
        return str(folder), token, finished_before(folder, cfg) if cfg.resume else None

    def _take_lock(self, folder: Path) -> str:
        """Lock the folder, and write something new into the lock, by which other ranks see that it is the same."""
        self._lock = (folder / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run_dir {display_path(folder)} is in use by another run; "
                "wait until it ends, or give another --run_dir"
            ) from None
        except OSError:  # a file system without locks
            claim(folder / IN_USE)
        token = f"{platform.node()} {os.getpid()} {time.time()}"
        self._lock.truncate(0)
        self._lock.write(token)
        self._lock.flush()
        os.fsync(self._lock.fileno())  # for the ranks on other machines
        return token

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def overwritten_bytes(self) -> int:
        """How much room there will be when the run that this one overwrites is deleted. For rank 0."""
        return sum(path.lstat().st_size for path in self._old if path.is_file())

    def begin(self, steps_done: int, before: dict[str, Any]) -> None:
        """Training begins: delete the run that this one overwrites, and write what runs now. For rank 0."""
        self._delete_overwritten()
        self.write_facts(steps_done)
        if before:
            self.write(kept.FILE, json.dumps(before))

    def _delete_overwritten(self) -> None:
        """All of it but what this run's monitors have written anew."""
        try:
            (self.path / "result.json").unlink(missing_ok=True)
            for path, identity in self._old.items():
                if path.is_dir() and not path.is_symlink():
                    with contextlib.suppress(OSError):  # it is not empty
                        path.rmdir()
                elif path.parent == self.path and path.name in UNTRAINED:
                    continue  # it is replaced
                elif os.path.lexists(path) and _identity(path) == identity:
                    path.unlink()
            if self._old:
                for log in self.path.glob(".log*.txt"):
                    log.replace(self.path / log.name.removeprefix("."))
        except OSError as error:
            raise UserError(
                f"run_dir {display_path(self.path)}: what is to be overwritten cannot be deleted: "
                f"{error.filename}: {error.strerror}"
            ) from None

    def write_facts(self, steps_done: int) -> None:
        """config.yaml, ds_config.json, versions.json; and metrics.jsonl without steps that are to be done again."""
        facts = {
            "versions.json": json.dumps(versions(), indent=2) + "\n",
            "ds_config.json": json.dumps(self.ds_config, indent=2) + "\n",
            # Last: lib/launch/supervise.py sees by it that all is there.
            "config.yaml": yaml.safe_dump(dataclasses.asdict(self.cfg), sort_keys=False, allow_unicode=True),
        }
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            facts = {"metrics.jsonl": "".join(steps_until(lines, steps_done)), **facts}
        for name, text in facts.items():
            self.write(name, text)

    def write(self, name: str, text: str) -> None:
        """Write a file of the run folder, whole or not at all, whatever happens."""
        part = self.path / f".{name}"
        try:
            with part.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave the new name with nothing in the file
            part.replace(self.path / name)
        except OSError as error:
            raise _cannot_be_written(self.path, error) from None


def check_run_settings(cfg: Any, recipe: str) -> None:
    """Raise a UserError for settings of the run that contradict each other."""
    if (cfg.max_steps is None) == (cfg.epochs is None):
        raise UserError("set one of max_steps and epochs, and the other to null")
    if cfg.keep_best and cfg.eval_every is None:
        raise UserError("keep_best is true, but eval_every is null, so nothing would be scored; set --eval_every")
    if cfg.resume and cfg.overwrite:
        raise UserError(
            "resume and overwrite are both true: one keeps what is in run_dir, the other deletes it; set one of them"
        )
    if cfg.resume and not cfg.run_dir:
        runs = sorted(Path("runs").glob(f"{recipe}-*"), key=lambda run: run.stat().st_mtime)
        newest = f"; the newest is {runs[-1]}" if runs else ""
        raise UserError(f"--resume needs --run_dir, the folder of the run to go on with{newest}")


def check_ranks_agree(folder: Path, token: str, facts: dict[str, Any], facts_of_rank0: dict[str, Any]) -> None:
    """Raise a UserError where a rank, on another machine say, has another run folder or other settings than rank 0."""
    lock = folder / ".lock"
    if ranks.first_problem(None if lock.is_file() and lock.read_text(encoding="utf-8") == token else "other"):
        raise UserError(
            f"not every rank sees the same run_dir {display_path(folder)}: it must be on a disk that all machines share"
        )
    differing = next((name for name, value in facts.items() if value != facts_of_rank0[name]), None)
    problem = ranks.first_problem(
        None if differing is None else f"{differing} is {facts[differing]!r}, on rank 0 {facts_of_rank0[differing]!r}"
    )
    if problem is not None:
        raise UserError(f"{problem}; all machines need the same code, YAML, DeepSpeed JSON and command line")


def _cannot_be_written(folder: Path, error: OSError) -> UserError:
    return UserError(f"run_dir {display_path(folder)} cannot be written: {error.strerror or error}")


def _contents_first(path: Path) -> Iterator[Path]:
    """The path and all that is below it, each folder after what it holds; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            yield from _contents_first(inner)
    yield path


def _identity(path: Path) -> tuple[int, int]:
    """A pair that changes when a file is replaced by one of the same name; the inode number alone can be used again."""
    found = path.lstat()
    return found.st_ino, found.st_ctime_ns


def claim(file: Path) -> None:
    """Take a run folder where the file system has no locks, by making a file that only one run can make.

    The file goes with this process. One that a killed process of this machine has left is taken over. Raises UserError
    where another run has the folder.
    """
    me = psutil.Process()
    while True:
        try:
            with file.open("x", encoding="utf-8") as made:
                json.dump({"host": platform.node(), "process": me.pid, "started": me.create_time()}, made)
            atexit.register(file.unlink, missing_ok=True)
            return
        except FileExistsError:
            if not _is_stale(file):
                raise UserError(
                    f"run_dir {display_path(file.parent)} is in use by another run, says {display_path(file)} (the "
                    f"file system has no locks): {' '.join(file.read_text(encoding='utf-8').split())}; if that process "
                    "has ended, delete the file"
                ) from None
            file.unlink(missing_ok=True)


def _is_stale(file: Path) -> bool:
    """Whether the process that made this file has ended, as far as this machine can tell."""
    try:
        made = json.loads(file.read_text(encoding="utf-8"))
        return made["host"] == platform.node() and psutil.Process(made["process"]).create_time() != made["started"]
    except (psutil.NoSuchProcess, FileNotFoundError):
        return True
    except (OSError, ValueError, LookupError, TypeError):
        return False

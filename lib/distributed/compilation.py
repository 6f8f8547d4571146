"""Operators that DeepSpeed compiles at their first use. It imports nothing large."""

import os
import time
from pathlib import Path

import psutil

from lib.errors import UserError

JUST_NOW_SECONDS = 60  # the compiler of a lock that was made since may not have started yet


def check_compilation(operator: str) -> None:
    """Raise a UserError where an operator that DeepSpeed would compile now waits for a compilation that was killed.

    torch marks a compilation by a file `lock`, which a killed one leaves behind, and every later run waits for it
    without a word.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")  # torch/utils/cpp_extension.py
    for lock in root.glob(f"**/{operator}/lock"):
        if (
            lock.exists()
            and time.time() - lock.stat().st_mtime > JUST_NOW_SECONDS
            and not any(_works_in(process, lock.parent) for process in psutil.process_iter())
        ):
            raise UserError(
                f"{lock} was left by a compilation of {operator} that was killed, and this run would wait for it for "
                "ever: delete the file "
                "(unless another machine that shares it is compiling now)"
            )


def _works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return Path(process.cwd()) == folder
    except (psutil.Error, OSError):  # it has ended, or is another user's
        return False

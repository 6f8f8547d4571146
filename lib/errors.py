"""Errors that a user can mend, exit codes, paths as a user types them. It imports nothing of lib and nothing large."""

import difflib
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of this repository

# Exit codes of launch.sh and of a run, the same on every rank. 0: finished. 128 + signal: ended before training.
STOPPED = 75  # the run stopped as asked and is saved; --resume goes on with it (EX_TEMPFAIL: try again later)
MISTAKE = 2  # a UserError: another start would fail in the same way
INTERRUPTED = 128 + 2  # by Ctrl-C, before there was anything to save
FAULT = 1  # a lost rank, or a bug: another start may succeed
EXIT_SECONDS = 120  # how long exit functions may take; monitors end their uploads in them
UNKILLABLE_SECONDS = 60  # a process that still exists so long after SIGKILL is given up


class UserError(Exception):
    """Something the user can mend. Its text is one line that says what is wrong and what to do."""


class OutOfMemory(UserError):
    """The memory of a device does not suffice; what else uses it may be gone at another start."""


class Stopped(Exception):
    """The run was asked to stop and has saved its state, or had nothing left to do.

    `code` is the exit code of every rank.
    """

    def __init__(self, text: str, code: int):
        super().__init__(text)
        self.code = code


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the word of `known` that is most like `word`, or "" where none is like it."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def display_path(path: Path | str) -> str:
    """A path as a user would type it: relative where it lies below the current folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def from_home(path: str) -> str:
    """The path with the home folder for a leading ~, which no shell expands in a YAML or in --run_dir=~/try."""
    return os.path.expanduser(path)  # noqa: PTH111  # a hub id is no Path


def new_folder(prefix: str) -> Path:
    """Make the folder <prefix>-<date>-<time>. If another process has made it in this second, wait for the next one."""
    while True:
        folder = Path(f"{prefix}-{time.strftime('%Y%m%d-%H%M%S')}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            time.sleep(0.1)
        else:
            return folder


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Call a command's main with the arguments of this process, and exit with the code that it returns, if any.

    A mistake is one line, Ctrl-C none.
    """
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(MISTAKE)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever read the output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)

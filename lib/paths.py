"""Folders as a user names them, and new ones that no other run has. It imports nothing large: lib/supervise.py needs it."""

import os
import time
from pathlib import Path


def from_home(path: str) -> str:
    """The path with a leading ~ as the home folder: no shell expands one in a YAML, or in --run_dir=~/try."""
    return os.path.expanduser(path)  # noqa: PTH111  # a hub id is no Path


def new_folder(prefix: str) -> Path:
    """Make the folder <prefix>-<date>-<time>. Of several that start in the same second, each gets a second of its own."""
    while True:
        folder = Path(f"{prefix}-{time.strftime('%Y%m%d-%H%M%S')}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            time.sleep(0.1)
        else:
            return folder

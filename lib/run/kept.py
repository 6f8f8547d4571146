"""before.json in the run folder: what the model gave before training, which a resumed run could not find out again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.distributed import ranks

FILE = "before.json"


class Kept:
    """Values by name, in forms that JSON has. Every rank makes it.

    resumed: whether training goes on from a checkpoint, with the values of the first start.
    """

    def __init__(self, run_folder: Path, resumed: bool):
        self.values: dict[str, Any] = ranks.on_rank0(lambda: _read(run_folder / FILE)) if resumed else {}

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        """What compute() gives, or gave at the first start. Every rank must call it, before the first step.

        name: says what it is, and of how many rows, because their number may be another in a resumed run.
        """
        if name not in self.values:
            self.values[name] = compute()
        return self.values[name]


def _read(file: Path) -> dict[str, Any]:
    """Empty if the file cannot be read: all is computed anew then, from the weights that training began with."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}

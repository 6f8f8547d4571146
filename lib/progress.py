"""Signs of life: work that takes longer than ten seconds is named on the console, with its progress and the time left.

    with progress("evaluating", total=len(rows)) as advance:     or, without a total, as a decorator
        ...
        advance(16)

A run starts one thread on rank 0 (`Signs` in lib/run/signs.py), which prints this when nothing has been printed for a
while. The thread reads the words and numbers in `at_work` and writes to the console. It touches no tensor, device or
process group.
Where there is no such thread, as on the other ranks, nothing is printed.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tqdm import tqdm


@dataclass(eq=False)
class Work:
    """Work that takes a while. total: how many units it has; None: unknown."""

    what: str
    total: int | None = None
    unit: str = ""
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    def advance(self, count: int) -> None:
        self.done += count

    def __str__(self) -> str:
        seconds = time.monotonic() - self.started
        if not self.total:
            return f"{self.what}: {clock(seconds)} so far"
        done = min(self.done, self.total)
        left = f", {clock(seconds / done * (self.total - done))} left" if done else ""
        return f"{self.what}: {done:,} of {self.total:,} {self.unit}, {clock(seconds)} so far{left}"

    def bar(self, columns: int) -> str:
        """The same text as a progress bar, `columns` characters wide."""
        done = min(self.done, self.total) if self.total else self.done
        layout = None if self.total else "{desc}: {elapsed} so far"
        return str(
            tqdm.format_meter(
                done,
                self.total or None,
                time.monotonic() - self.started,
                ncols=columns,
                prefix=self.what,
                unit=self.unit,
                bar_format=layout,
            )
        )


at_work: list[Work] = []  # from the outermost to the innermost


@contextlib.contextmanager
def progress(what: str, total: int | None = None, unit: str = "rows") -> Iterator[Callable[[int], None]]:
    """Name the work of a `with` block, or of a function as its decorator, on the console if it takes long.

    Gives a function to call with the number of units done since the last call.
    """
    work = Work(what, total, unit)
    at_work.append(work)
    try:
        yield work.advance
    finally:
        at_work.remove(work)


def clock(seconds: float) -> str:
    """1:05, or 2:00:00."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"

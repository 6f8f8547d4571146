"""Signs of life: what takes longer than ten seconds says on the console what it is, how far it has come and how long it will still take.

    with progress("evaluating", total=len(rows)) as advance:     or, without a total, as a decorator
        ...
        advance(16)

A run starts one thread on rank 0 (`Signs`), which says it when the console has been silent for long. The thread reads these words and numbers and writes to
the console, nothing else: no tensor, device or process group. Without a run, and on the other ranks, nobody looks.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tqdm import tqdm


@dataclass(eq=False)
class Work:
    """Something that takes a while. total: of its units, None where it is not known."""

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
        """The same as a bar of so many columns."""
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


at_work: list[Work] = []  # the innermost last


@contextlib.contextmanager
def progress(what: str, total: int | None = None, unit: str = "rows") -> Iterator[Callable[[int], None]]:
    """Say what is done inside, if it takes long; what it gives is to be called with the number of units that are done. It also works as a decorator."""
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

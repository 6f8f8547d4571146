"""Signs of life: what takes longer than ten seconds says on the console what it is, how far it has come and how long it will still take.

    with progress("evaluating", total=len(rows)) as advance:     or, without a total, as a decorator
        ...
        advance(16)

A run starts one thread on rank 0 (`Signs`), which says it when the console has been silent for long. The thread reads these words and numbers and writes to
the console, nothing else: no tensor, device or process group. Without a run, and on the other ranks, nobody looks.
"""

import contextlib
import io
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from tqdm import tqdm

SILENCE = 10.0  # seconds of the console after which there is a sign of life
LONGEST_SILENCE = 600.0  # each sign of the same work comes after twice the silence of the one before, up to this


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
            tqdm.format_meter(done, self.total or None, time.monotonic() - self.started, ncols=columns, prefix=self.what, unit=self.unit, bar_format=layout)
        )


_at_work: list[Work] = []  # the innermost last


@contextlib.contextmanager
def progress(what: str, total: int | None = None, unit: str = "rows") -> Iterator[Callable[[int], None]]:
    """Say what is done inside, if it takes long; what it gives is to be called with the number of units that are done. It also works as a decorator."""
    work = Work(what, total, unit)
    _at_work.append(work)
    try:
        yield work.advance
    finally:
        _at_work.remove(work)


class Signs:
    """Prints on a console, and there says what is at work when nothing else was printed for long: on a terminal as a bar that moves, elsewhere as lines."""

    def __init__(self, console: IO[str] | io.TextIOBase):
        self.console = console
        self.phase: Work | None = None  # of the run: what is shown where nothing else is at work
        self.bar: Any = None  # tqdm's, whose clock goes on between two steps
        self._silences: weakref.WeakKeyDictionary[Work, float] = weakref.WeakKeyDictionary()  # after which the next sign of each comes
        self._lock = threading.Lock()
        self._printed_at = time.monotonic()
        self._drawn = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __enter__(self) -> "Signs":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def print(self, text: str) -> None:
        with self._lock:
            self._clear()
            print(text, file=self.console, flush=True)
            self._printed_at = time.monotonic()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        with self._lock:
            self._clear()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, SILENCE / 4)):
            with self._lock, contextlib.suppress(OSError, ValueError):  # a console that is gone
                self._look()

    def _look(self) -> None:
        now, work = time.monotonic(), [self.phase, *_at_work][-1]
        if work is None:
            self._clear()
            if self.bar is not None:
                self.bar.refresh()
        elif self.console.isatty():
            if self._drawn or now - max(work.started, self._printed_at) >= SILENCE:
                columns = os.get_terminal_size(self.console.fileno()).columns or 80
                self.console.write(f"\r\033[K{work.bar(columns - 1)}\r")  # what is printed next goes over it
                self.console.flush()
                self._drawn = True
        elif now - self._printed_at >= (silence := self._silences.get(work, SILENCE)):
            self._silences[work] = min(2 * silence, LONGEST_SILENCE)
            print(work, file=self.console, flush=True)
            self._printed_at = now

    def _clear(self) -> None:
        if self._drawn:
            self.console.write("\033[K")
            self.console.flush()
            self._drawn = False


def clock(seconds: float) -> str:
    """1:05, or 2:00:00."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"

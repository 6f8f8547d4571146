"""Signs of life on the console while something takes long."""

import contextlib
import io
import os
import threading
import time
import weakref
from typing import IO, Any

from lib.progress import Work, at_work

SILENCE = 10.0  # seconds of the console after which there is a sign of life

LONGEST_SILENCE = 600.0  # each sign of the same work comes after twice the silence of the one before, up to this


class Signs:
    """Prints on a console, and there says what is at work when nothing else was printed for long: on a terminal as a
    bar that moves, elsewhere as lines."""

    def __init__(self, console: IO[str] | io.TextIOBase):
        self.console = console
        self.phase: Work | None = None  # of the run: what is shown where nothing else is at work
        self.bar: Any = None  # tqdm's, whose clock goes on between two steps
        # Seconds of silence before the next sign, for each work.
        self._silences: weakref.WeakKeyDictionary[Work, float] = weakref.WeakKeyDictionary()
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
        now, work = time.monotonic(), [self.phase, *at_work][-1]
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

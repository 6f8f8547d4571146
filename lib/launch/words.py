"""What a machine's ranks print on its console; after a fault the first machine's console shows the end of it too."""

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from typing import IO

LINES = 60  # of a traceback, and what comes before it


@contextlib.contextmanager
def overheard(listen: bool) -> Iterator[tuple[IO[bytes] | None, deque[str]]]:
    """(a file whose lines go on to this process's stderr, the last of these lines). All have come when the block ends.

    Where nobody is to listen: (None, nothing).
    """
    lines: deque[str] = deque(maxlen=LINES)
    if not listen:
        yield None, lines
        return
    reading, writing = os.pipe()

    def pass_on() -> None:
        with open(reading, encoding="utf-8", errors="replace") as printed:  # noqa: PTH123  # a descriptor
            for line in printed:
                lines.append(line.rstrip())
                print(lines[-1], file=sys.stderr)

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    with open(writing, "wb", buffering=0) as output:  # noqa: PTH123
        yield output, lines
    reader.join(5)  # a process that the kernel holds keeps its end open


def of_the_fault(lines: deque[str]) -> list[str]:
    """The lines from the first error or traceback on; all where there is none, as of a library that aborts."""
    found = list(lines)
    signs = ("error: ", "Traceback (")
    return found[next((at for at, line in enumerate(found) if line.startswith(signs)), 0) :]

"""The console, which may be gone, full, or unable to show a sign: text can be lost there, a run must not."""

import codecs
import contextlib
import io
import locale
import os
from typing import Any


class _Descriptor(io.RawIOBase):
    """Writes to a file descriptor as much as it takes. It stays the caller's to close."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        left = memoryview(data)
        with contextlib.suppress(OSError):
            while left:
                left = left[os.write(self._descriptor, left) :]
        return len(data)


class Console(io.TextIOWrapper):
    """Text to a file descriptor, line by line: writing never raises.

    A terminal that has closed, a reader that has left and a file on a full disk lose text. Signs that the terminal's
    encoding lacks become "?".
    """

    def __init__(self, descriptor: int):
        of_locale = locale.getencoding()  # also where Python itself is in its UTF-8 mode
        encoding = "utf-8" if codecs.lookup(of_locale).name == "ascii" else of_locale  # ASCII: no locale is set
        super().__init__(io.BufferedWriter(_Descriptor(descriptor)), encoding, "replace", line_buffering=True)

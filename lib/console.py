"""The console, which may be gone, full, or unable to show a sign: text can be lost there, a run must not."""

import codecs
import contextlib
import io
import locale
import os


class Console(io.TextIOBase):
    """Text to a file descriptor, as far as it takes it: writing never raises.

    A terminal that has closed, a reader that has left and a file on a full disk lose text. Signs that the terminal's encoding lacks become "?".
    The descriptor stays the caller's to close.
    """

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        of_locale = locale.getencoding()  # also where Python itself is in its UTF-8 mode
        self._encoding = "utf-8" if codecs.lookup(of_locale).name == "ascii" else of_locale  # ASCII: no locale is set

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a plain attribute there
        return self._encoding

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        data = text.encode(self._encoding, "replace")
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._descriptor, data) :]
        return len(text)

"""Standard output and standard error that may be closed, full or without a reader.

`write_output` writes what a command was asked for, and raises where that fails. `write_notice`
writes what is only for information, and never fails.
"""

import contextlib
import io
import os
import sys
from typing import TextIO

from cottention.engine.errors import CottentionError


class OutputError(CottentionError):
    """Standard output does not take what a command writes: it is full or closed."""


class ReaderGoneError(OutputError):
    """Whoever read standard output, such as `head`, has closed it."""


def protect_standard_streams() -> None:
    """Prepare the standard streams of a process.

    Descriptors 0 to 2 that are closed become unusable ones, so that no file or socket gets their
    number. Characters that an encoding lacks are escaped. What standard error does not take is
    dropped.
    """
    _fill_closed_descriptors()
    if sys.stdout is None:  # Python's value for a descriptor that was closed
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr = dropping_stream(2, sys.stderr)


def dropping_stream(descriptor: int, like: TextIO | None) -> TextIO:
    """A text stream that drops what cannot be written; its encoding is that of `like`."""
    encoding = "utf-8" if like is None else like.encoding
    buffer = io.BufferedWriter(_DroppingFile(descriptor))
    return io.TextIOWrapper(
        buffer, encoding, errors="backslashreplace", line_buffering=True, write_through=True
    )


def write_output(text: str) -> None:
    """Write text to standard output at once. Raises OutputError."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except ConnectionError:  # EPIPE, or a socket that was reset
        raise ReaderGoneError("standard output was closed by its reader") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"cannot write to standard output: {reason}") from None


def write_notice(text: str, stream: TextIO | None) -> None:
    """Write text to a stream, if that can be done."""
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):  # the encoding's error is a ValueError
            stream.write(text)
            stream.flush()


class _DroppingFile(io.RawIOBase):
    """A descriptor; what it does not take is dropped."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: object) -> int:
        raw = memoryview(data)  # type: ignore[arg-type]  # any buffer
        try:
            return os.write(self._descriptor, raw)
        except OSError:
            return raw.nbytes


def _fill_closed_descriptors() -> None:
    """Open each closed one of 0, 1 and 2 so that it can neither be read nor written as usual."""
    for descriptor, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest number that is free: this one

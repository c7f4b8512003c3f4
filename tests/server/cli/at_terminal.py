"""A command of `cottention` at a terminal of its own: a pty that controls its session."""

import contextlib
import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[3]
PATIENCE = 200.0
"""Seconds after which something hangs, where a model may have to be loaded at low priority."""

CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
XTERM = {"TERM": "xterm"}
COLOURS = re.compile(r"\x1b\[\d+m")
ESCAPES = re.compile(r"\x1b\[[?\d;]*[a-zA-Z]|\x01|\x02")


class AtTerminal:
    """A running command. `seen` is all that the terminal has shown."""

    def __init__(self, popen: "subprocess.Popen[bytes]", terminal: int) -> None:
        self._popen = popen
        self._terminal = terminal
        self._num_read = 0
        self.seen = ""

    @property
    def text(self) -> str:
        """What was shown, without escape sequences."""
        return ESCAPES.sub("", self.seen).replace("\r\n", "\n")

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def interrupts(self, text: str) -> None:
        """Type Ctrl-C until a text is shown.

        Between showing its prompt and waiting for a line, readline takes no note of a signal.
        """
        deadline = time.monotonic() + PATIENCE
        while text not in self.text[self._num_read :]:
            assert time.monotonic() < deadline, f"no {text!r} in {self.text!r}"
            self.type(CTRL_C)
            again = time.monotonic() + 1.0
            while text not in self.text[self._num_read :] and time.monotonic() < again:
                assert self._read(), f"it ended without {text!r}: {self.text!r}"
        self.shows(text)

    def shows(self, text: str) -> str:
        """Wait for a text after those that were waited for before; returns what is before it."""
        deadline = time.monotonic() + PATIENCE
        while (found := self.text.find(text, self._num_read)) < 0:
            assert time.monotonic() < deadline, f"no {text!r} in {self.text!r}"
            assert self._read(), f"it ended without {text!r}: {self.text!r}"
        before = self.text[self._num_read : found]
        self._num_read = found + len(text)
        return before

    def ends(self) -> int:
        """The exit status, once it has ended."""
        deadline = time.monotonic() + PATIENCE
        while self._read():
            assert time.monotonic() < deadline, f"it goes on: {self.text!r}"
        return self._popen.wait(PATIENCE)

    def _read(self) -> bool:
        """Read what has come, waiting for a moment; whether there may be more."""
        if select.select([self._terminal], [], [], 0.1)[0]:
            try:
                raw = os.read(self._terminal, 65536)
            except OSError:  # how Linux says that all others have closed it
                return False
            self.seen += raw.decode(errors="replace")
            return bool(raw)
        return True


COTTENTION = (sys.executable, "-m", "cottention.server")


@contextlib.contextmanager
def at_terminal(
    home: Path,
    *arguments: object,
    environ: Mapping[str, str] | None = None,
    program: Sequence[str] = COTTENTION,
) -> Iterator[AtTerminal]:
    """`cottention ARGUMENTS` with the history of a home folder; killed at the end.

    Unless `environ` has another TERM the terminal is a dumb one, on which lines are edited, and
    bars, which come when a machine is slow, are not drawn. program: what is run instead.
    """
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    popen = subprocess.Popen(
        ["setsid", "--ctty", *program, *map(str, arguments)],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"XDG_STATE_HOME": str(home), "TERM": "dumb"} | dict(environ or {}),
    )
    os.close(theirs)
    try:
        yield AtTerminal(popen, ours)
    finally:
        popen.kill()
        popen.wait()
        os.close(ours)

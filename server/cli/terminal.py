"""A person at a terminal: reading lines with a history, showing text, notes and colours.

Lines are edited by Python's own readline: it is there already, reads the user's inputrc, and a
conversation needs no more than lines, their history and completion of commands.
"""

import contextlib
import glob
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from cottention.engine.errors import ConfigurationError
from cottention.engine.standard_streams import write_notice, write_output

BOLD, DIM, RED = "1", "2", "31"
MAX_HISTORY = 1000

PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}
HARMLESS = PICTURES | dict.fromkeys(range(0x80, 0xA0), 0xFFFD) | {ord("\r"): None}
"""Control characters as their pictures: what a model writes must not steer a terminal."""


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person sees what is written there, or writes what is read."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # it is closed
        return False


def has_colours(stream: TextIO | None) -> bool:
    """Whether escape sequences may be written: a terminal, and neither NO_COLOR nor a dumb one."""
    return (
        is_terminal(stream)
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM", "") not in ("", "dumb")
    )


def coloured(text: str, code: str, stream: TextIO | None) -> str:
    """Text with a colour where the stream shows it."""
    return f"\033[{code}m{text}\033[0m" if has_colours(stream) else text


def show(text: str) -> None:
    """Write a model's text to standard output. Raises OutputError."""
    write_output(text.translate(HARMLESS) if is_terminal(sys.stdout) else text)


def note(text: str, code: str = DIM) -> None:
    """Tell the person something, on standard error."""
    write_notice(coloured(text.translate(HARMLESS), code, sys.stderr) + "\n", sys.stderr)


def standard_input() -> str:
    """All of standard input. Raises ConfigurationError."""
    if sys.stdin is None:  # Python's value for a descriptor that was closed
        raise ConfigurationError("standard input is closed; give PROMPT, or a file or a pipe")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"standard input is not UTF-8: {error}") from None
    except OSError as error:
        raise ConfigurationError(f"standard input cannot be read: {error.strerror}") from None


class LineReader:
    """Reads lines with editing, a history on disk, and completion of commands and files."""

    def __init__(self, commands: Sequence[str]) -> None:
        self._commands = commands
        self._readline = _readline()
        self._num_old = 0
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")

    def __enter__(self) -> "LineReader":
        if (readline := self._readline) is not None:
            with contextlib.suppress(OSError):
                readline.read_history_file(history_path())
            self._num_old = readline.get_current_history_length()
            readline.set_completer_delims(" \n")
            readline.set_completer(self._complete)
            readline.parse_and_bind("tab: complete")
        return self

    def __exit__(self, *_: object) -> None:
        """Append this conversation's lines to the history, which others may have added to."""
        if (readline := self._readline) is None:
            return
        num_new = readline.get_current_history_length() - self._num_old
        path = history_path()
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.set_history_length(MAX_HISTORY)
            readline.append_history_file(num_new, path)

    def read(self, prompt: str) -> str | None:
        """The next line without its end; None at the end of input."""
        colour = has_colours(sys.stdout)
        try:
            if self._readline is None or not is_terminal(sys.stdout):
                write_notice(prompt, sys.stderr)
                line = sys.stdin.readline()
                return line.rstrip("\n") if line else None
            # \1 and \2: readline counts what is between them as of no width
            return input(f"\1\033[{BOLD}m\2{prompt}\1\033[0m\2" if colour else prompt)
        except EOFError:
            return None

    def _complete(self, text: str, state: int) -> str | None:
        line = self._readline.get_line_buffer()[: self._readline.get_endidx()]
        if not line.startswith("/"):
            return None
        if " " not in line:
            found = [each for each in self._commands if each.startswith(text)]
        else:
            paths = glob.glob(glob.escape(os.path.expanduser(text)) + "*")
            found = [f"{path}/" if os.path.isdir(path) else path for path in sorted(paths)]
        return found[state] if state < len(found) else None


def history_path() -> Path:
    """Where the lines of earlier conversations are."""
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(home, "cottention", "history")


def _readline() -> Any:
    """The module; None where Python was built without it."""
    try:
        import readline
    except ImportError:
        return None
    return readline

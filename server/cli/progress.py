"""Progress bars for what takes a while: on a terminal only, on standard error, gone at the end.

Drawn by rich, which training uses as well: it is imported where a bar may be shown and nowhere
else.
"""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from cottention.engine.config import EngineConfig
from cottention.engine.models.model_folder import DEFAULT_MODEL
from cottention.server.cli.terminal import is_terminal

Engine = TypeVar("Engine")

Report = Callable[[int, int], None]
"""Takes how much is done, and how much there is in all."""

DELAY_SECONDS = 0.5
"""What is done sooner shows no bar."""


WATCH_SECONDS = 0.1

UNABLE = ("", "dumb", "unknown")
"""Terminals that do not move their cursor."""


def silent(_done: int, _total: int) -> None:
    """A report that nobody sees."""


@contextlib.contextmanager
def progress(what: str, num_left: Callable[[], int] | None = None) -> Iterator[Report]:
    """A bar named `what` while the block runs; it only moves to and fro until a report comes.

    num_left: how much is left, which is asked from time to time instead; 0 where it is not known.
    """
    if not _takes_bars():
        yield silent
        return
    bar = _Bar(what, num_left)
    timer = threading.Timer(DELAY_SECONDS, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield bar.update
    finally:
        timer.cancel()
        bar.stop()


def _takes_bars() -> bool:
    """Whether standard error is a terminal that moves its cursor."""
    return is_terminal(sys.stderr) and os.environ.get("TERM", "") not in UNABLE


class _Bar:
    """A bar that a timer starts, unless it has been stopped before."""

    def __init__(self, what: str, num_left: Callable[[], int] | None) -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
        self._bar = Progress(
            *columns,
            TaskProgressColumn(),
            console=Console(file=sys.stderr),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task(escape(what), total=None)
        self._lock = threading.Lock()
        self._is_stopped = False
        self._handlers: list[logging.StreamHandler[Any]] = []
        self._num_left, self._total = num_left, 0
        self._ended = threading.Event()

    def start(self) -> None:
        """Begin to draw; what is logged meanwhile goes above the bar."""
        from rich.file_proxy import FileProxy

        with self._lock:
            if self._is_stopped:
                return
            self._bar.start()
            above: Any = FileProxy(self._bar.console, sys.stderr)
            for each in logging.getLogger().handlers:
                if isinstance(each, logging.StreamHandler) and each.stream is sys.stderr:
                    each.setStream(above)
                    self._handlers.append(each)
        if self._num_left is not None:
            self._watch(self._num_left)

    def _watch(self, num_left: Callable[[], int]) -> None:
        """In the timer's thread, until the bar is stopped."""
        while not self._ended.wait(WATCH_SECONDS):
            left = num_left()
            self._total = max(self._total, left)
            if left:
                self.update(self._total - left, self._total)

    def update(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)

    def stop(self) -> None:
        self._ended.set()
        with self._lock:
            self._is_stopped = True
            for each in self._handlers:
                each.setStream(sys.stderr)
            self._bar.stop()


def loaded(
    opener: Callable[[str | None, EngineConfig], Engine], model: str | None, config: EngineConfig
) -> Engine:
    """What `opener` makes of a model, with bars while the ops are compiled and the model is read.

    What a download needs, huggingface-hub shows.
    """
    compile_ops()
    with progress(f"loading {model or DEFAULT_MODEL.name}"):
        return opener(model, config)


def compile_ops() -> None:
    """Compile the ops where that has to be done, with a bar; what fails is told at their use."""
    if not _takes_bars():
        return
    from cottention.engine.ops.build import BuildError, build, find, is_wanted

    with contextlib.suppress(BuildError, OSError):
        if is_wanted() and find() is None:
            with progress("compiling the ops, once") as report:
                build(report=report)

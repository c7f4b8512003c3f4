"""Progress of training: a bar on a terminal, otherwise a plain line from time to time."""

import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from cottention.engine.standard_streams import write_notice

SECONDS_BETWEEN_LINES = 20.0


@dataclass(frozen=True, slots=True)
class TrainingStatus:
    """State of a run after a step; times in seconds."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float
    bits_per_byte: float | None

    def line(self) -> str:
        """Everything in one line."""
        score = "—" if self.bits_per_byte is None else f"{self.bits_per_byte:.4f}"
        return (
            f"step {self.step}/{self.steps}  loss {self.loss:.3f}  held-out bits/byte {score}"
            f"  {self.tokens_per_second:,.0f} tokens/s  {self.seconds_left / 60:.0f} min left"
        )


class PlainProgress:
    """Prints every message, and a status line at most every 20 seconds."""

    def __init__(self) -> None:
        self._last = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def update(self, status: TrainingStatus) -> None:
        """Report a step."""
        now = time.monotonic()
        if now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            write_notice(status.line() + "\n", sys.stdout)

    def log(self, message: str) -> None:
        """Print a message."""
        write_notice(message + "\n", sys.stdout)


class BarProgress(PlainProgress):
    """A progress bar by rich, with messages above it."""

    def __init__(self) -> None:
        super().__init__()
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar = Progress(BarColumn(), TextColumn("{task.description}"))
        self._task: Any = self._bar.add_task("", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(self, status: TrainingStatus) -> None:
        self._bar.update(
            self._task,
            completed=status.step,
            total=status.steps,
            description=status.line(),
        )

    def log(self, message: str) -> None:
        self._bar.console.print(message, highlight=False, markup=False)


def open_progress() -> PlainProgress:
    """A bar if stdout is a terminal and rich is installed, otherwise plain lines."""
    if not sys.stdout.isatty():
        return PlainProgress()
    try:
        return BarProgress()
    except ImportError:
        return PlainProgress()

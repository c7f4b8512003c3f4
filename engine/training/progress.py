"""Tells a person how training goes: a bar on a terminal, a plain line now and then elsewhere.

Owns what is printed. Knows numbers only.
"""

import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

SECONDS_BETWEEN_LINES = 20.0


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a run stands after a step; times in seconds."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float
    bits_per_byte: float | None

    def line(self) -> str:
        """All of it in one line."""
        score = "—" if self.bits_per_byte is None else f"{self.bits_per_byte:.4f}"
        return (
            f"step {self.step}/{self.steps}  loss {self.loss:.3f}  held-out bits/byte {score}"
            f"  {self.tokens_per_second:,.0f} tokens/s  {self.seconds_left / 60:.0f} min left"
        )


class PlainProgress:
    """Prints a line at most every so many seconds, and every message."""

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

    def show(self, standing: Standing) -> None:
        """Report a step."""
        now = time.monotonic()
        if now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            print(standing.line(), flush=True)

    def say(self, message: str) -> None:
        """Report anything else."""
        print(message, flush=True)


class BarProgress(PlainProgress):
    """The same as a bar of rich's, with messages above it."""

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

    def show(self, standing: Standing) -> None:
        self._bar.update(
            self._task,
            completed=standing.step,
            total=standing.steps,
            description=standing.line(),
        )

    def say(self, message: str) -> None:
        self._bar.console.print(message, highlight=False, markup=False)


def open_progress() -> PlainProgress:
    """A bar if someone watches and rich is installed, plain lines otherwise."""
    if not sys.stdout.isatty():
        return PlainProgress()
    try:
        return BarProgress()
    except ImportError:
        return PlainProgress()

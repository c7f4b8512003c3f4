"""What becomes of one HTTP request: who asked, what was read and said, when and why it ended.

Owns the figures alone, and when they are all there: a turn may go on when its client has left. What
is done with them is others'.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cottention.server.reading import Reading
from starlette.types import Scope

LEFT = "client_left"
"""How a request ended whose client did not wait for its end."""


@dataclass(slots=True)
class Record:
    """key: the name of the one that was sent. num_prompt: tokens of all prompts.

    prompt_ids: of the first prompt. going_on: a turn that ends by itself, whoever waits for it.
    """

    key: str = ""
    num_prompt: int = 0
    prompt_ids: Sequence[int] = ()
    readings: list[Reading] = field(default_factory=list)
    going_on: asyncio.Task[None] | None = None

    def add(self, prompts: Sequence[Sequence[int]], reading: Reading) -> None:
        """The engine works for this request."""
        self.num_prompt += sum(map(len, prompts))
        self.prompt_ids = self.prompt_ids or prompts[0]
        self.readings.append(reading)

    def when_ended(self, tell: Callable[[], None]) -> None:
        """The request has been answered, or left: call `tell` when nothing is done for it."""
        if self.going_on is None or self.is_finished:
            tell()
        else:
            self.going_on.add_done_callback(lambda _: tell())

    @property
    def is_finished(self) -> bool:
        """Whether every choice has ended by itself."""
        return all(reading.is_finished for reading in self.readings)

    @property
    def num_generated(self) -> int:
        """Tokens of all choices."""
        return sum(reading.num_generated for reading in self.readings)

    @property
    def num_cached(self) -> int:
        """Tokens of prompts that were not read again."""
        return sum(reading.num_cached for reading in self.readings)

    @property
    def started(self) -> float | None:
        """When the first prompt had its slots."""
        return min((r.started for r in self.readings if r.started is not None), default=None)

    @property
    def first_token(self) -> float | None:
        """When the first token came."""
        return min((r.first_token for r in self.readings if r.first_token), default=None)

    @property
    def ended(self) -> str:
        """How its choices ended, each way once."""
        if not self.is_finished:
            return LEFT
        reasons = dict.fromkeys(each for reading in self.readings for each in reading.reasons)
        return ",".join(reasons)


def record_of(scope: Scope) -> Record:
    """The one of this request."""
    record: Record = scope["state"].setdefault("record", Record())
    return record

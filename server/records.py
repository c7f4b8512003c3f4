"""What becomes of one HTTP request: who asked, what was read and said, when and why it ended.

Owns the figures alone. What is done with them is others'.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.types import Scope

from server.reading import Reading

LEFT = "client_left"
"""How a request ended whose client did not wait for its end."""


@dataclass(slots=True)
class Record:
    """key: the name of the one that was sent. num_prompt: tokens of all prompts.

    prompt_ids: of the first prompt.
    """

    key: str = ""
    num_prompt: int = 0
    prompt_ids: Sequence[int] = ()
    readings: list[Reading] = field(default_factory=list)

    def add(self, prompts: Sequence[Sequence[int]], reading: Reading) -> None:
        """The engine works for this request."""
        self.num_prompt += sum(map(len, prompts))
        self.prompt_ids = self.prompt_ids or prompts[0]
        self.readings.append(reading)

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
        if not all(reading.is_finished for reading in self.readings):
            return LEFT
        reasons = dict.fromkeys(each for reading in self.readings for each in reading.reasons)
        return ",".join(reasons)


def record_of(scope: Scope) -> Record:
    """The one of this request."""
    record: Record = scope["state"].setdefault("record", Record())
    return record

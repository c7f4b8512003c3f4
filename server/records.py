"""What becomes of one HTTP request: who asked, what was read and said, when and why it ended.

Owns the figures alone. What is done with them is others'.
"""

from dataclasses import dataclass, field

from starlette.types import Scope

from server.reading import Reading


@dataclass(slots=True)
class Record:
    """key: the name of the one that was sent. num_prompt: tokens of all prompts."""

    key: str = ""
    num_prompt: int = 0
    readings: list[Reading] = field(default_factory=list)

    def add(self, num_prompt: int, reading: Reading) -> None:
        """The engine works for this request."""
        self.num_prompt += num_prompt
        self.readings.append(reading)

    @property
    def num_generated(self) -> int:
        """Tokens of all choices."""
        return sum(reading.num_generated for reading in self.readings)


def record_of(scope: Scope) -> Record:
    """The one of this request."""
    record: Record = scope["state"].setdefault("record", Record())
    return record

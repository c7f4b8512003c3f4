"""Where the context of a token begins: arithmetic on its absolute index, and nothing else.

Owns the grid on which a state is renewed. Knows no states, rows or requests: what a token is
computed from follows from its index alone, so that prompts cut into any pieces, parked sessions and
batches of any company agree.

Under `exact`, the papers' recurrence to the letter, every token is computed in the state of all
before it. Under `renew`, with W the window and R the ids that are kept, the state becomes, at index
W and then every W − R, that of the last R ids at positions 1 to R: positions never leave the window
that the model was trained on, and what is older than the context's start is forgotten. The price is
R / (W − R) ids read again for each id.

    index        0 ......... W−R ...... W ............ 2W−2R ..... 2W−R
    first state  |----------------------|
    second                    |..spare..|--------------------------|
    third                                               |..spare...|----
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

ContextPolicy = Literal["renew", "exact"]


class Window(NamedTuple):
    """Ids first:stop are computed in a state that begins with the id at `start`."""

    start: int
    first: int
    stop: int


class Grid(Protocol):
    """Where contexts begin."""

    @property
    def name(self) -> str:
        """In a snapshot: states of another grid of the same name would be of other ids."""
        ...

    def start(self, index: int) -> int:
        """Index of the oldest id in the state in which the id at `index` is computed."""
        ...

    def ahead(self, index: int, last: int) -> int | None:
        """Where the context after that of `index` begins, if the id at `index` belongs to it, too.

        None where it does not, or where a sequence whose last id is at `last` never gets there.
        """
        ...

    def windows(self, stop: int) -> list[Window]:
        """All states that ids 0:stop are computed in."""
        ...


@dataclass(frozen=True, slots=True)
class Exact:
    """Nothing is ever forgotten."""

    name: str = "exact"

    def start(self, index: int) -> int:  # noqa: ARG002
        return 0

    def ahead(self, index: int, last: int) -> int | None:  # noqa: ARG002
        return None

    def windows(self, stop: int) -> list[Window]:
        return [Window(0, 0, stop)]


@dataclass(frozen=True, slots=True)
class Renewed:
    """At most `window` ids; when they are full, the last `kept` of them, at most half, go on."""

    window: int
    kept: int

    @property
    def name(self) -> str:
        return f"renew {self.kept}/{self.window}"

    @property
    def stride(self) -> int:
        """Ids from one renewal to the next."""
        return self.window - self.kept

    def start(self, index: int) -> int:
        if index < self.window:
            return 0
        return (index - self.kept) // self.stride * self.stride

    def ahead(self, index: int, last: int) -> int | None:
        begin = self.start(index) + self.stride
        return begin if index >= begin and last >= begin + self.kept else None

    def windows(self, stop: int) -> list[Window]:
        bounds = [0, *range(self.window, stop, self.stride), stop]
        return [Window(self.start(first), first, last) for first, last in pairwise(bounds)]


KEPT_PART = 4
"""R = W / 4: a third of an id is read again for each id."""


def grids(window: int) -> Mapping[ContextPolicy, Grid]:
    """By policy, for a model that was trained on `window` ids, from 2."""
    return {"exact": Exact(), "renew": Renewed(window, max(1, window // KEPT_PART))}

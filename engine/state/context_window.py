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

What of a prompt is read into which row, and in which order. Arithmetic alone; knows no torch.

Ids are named by their absolute index. A prompt reads no more than what survives in the state of its
last id, unless all of it is to be scored.
"""

from collections import deque
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


class ContextSchedule(Protocol):
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
class ExactSchedule:
    """Nothing is ever forgotten."""

    name: str = "exact"

    def start(self, index: int) -> int:  # noqa: ARG002
        return 0

    def ahead(self, index: int, last: int) -> int | None:  # noqa: ARG002
        return None

    def windows(self, stop: int) -> list[Window]:
        return [Window(0, 0, stop)]


@dataclass(frozen=True, slots=True)
class RenewalSchedule:
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


def context_schedules(window: int) -> Mapping[ContextPolicy, ContextSchedule]:
    """By policy, for a model that was trained on `window` ids, from 2."""
    return {"exact": ExactSchedule(), "renew": RenewalSchedule(window, max(1, window // KEPT_PART))}


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """Ids begin:stop into a row that holds start:begin; a row that holds none is cleared first.

    is_spare: into the spare row, for after the next renewal. scored_from: how likely the followers
    of ids from here on were can be told.
    """

    start: int
    begin: int
    stop: int
    is_spare: bool = False
    scored_from: int = 0


def prefill_spans(
    grid: ContextSchedule, held: int, stop: int, last: int, *, is_scored: bool
) -> deque[PrefillSpan]:
    """In order, to bring a row that holds ids up to `held` to where it holds them up to `stop`.

    last: index of the last id that the sequence can come to. Empty where the row is there already.
    """
    if held == stop:
        return deque()
    if is_scored:
        main = [
            PrefillSpan(w.start, w.start, w.stop, scored_from=w.first) for w in grid.windows(stop)
        ]
    else:
        start = grid.start(stop - 1)
        goes_on = held > 0 and grid.start(held - 1) == start
        main = [PrefillSpan(start, held if goes_on else start, stop)]
    begin = grid.ahead(stop - 1, last)
    spare = [] if begin is None else [PrefillSpan(begin, begin, stop, is_spare=True)]
    return deque([*spare, *main])

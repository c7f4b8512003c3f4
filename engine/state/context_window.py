"""Which ids a token is computed from, and which of a prompt's ids are prefilled into which row.

Everything here is arithmetic on a token's absolute index, so that prompts cut into chunks of any
size, paused requests, parked sessions and batches of any size agree. Loads no torch.

Under `exact`, the recurrence of the papers, a token is computed in the state of all ids before it.
Under `renew`, with W the window and R the ids that are kept, the state becomes, at index W and then
every W − R, that of the last R ids at positions 1 to R: positions never leave the window that the
model was trained on, and ids before the context's start are forgotten. The next state is prefilled
in the slot's spare row while the current one runs, which costs R / (W − R) prefilled ids per id.

    index        0 ......... W−R ...... W ............ 2W−2R ..... 2W−R
    first state  |----------------------|
    second                    |..spare..|--------------------------|
    third                                               |..spare...|----
"""

import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

ContextPolicy = Literal["renew", "exact"]


class Window(NamedTuple):
    """Ids first:stop are computed in the state whose oldest id is at index `start`."""

    start: int
    first: int
    stop: int


class ContextSchedule(Protocol):
    """The oldest id of the state in which each id is computed."""

    @property
    def name(self) -> str:
        """Identifies the schedule in a snapshot: equal names mean equal starts."""
        ...

    def start(self, index: int) -> int:
        """Index of the oldest id in the state in which the id at `index` is computed."""
        ...

    def ahead(self, index: int, last: int) -> int | None:
        """Start of the next context, if the id at `index` belongs to it as well.

        None if it does not, or if a sequence whose last id is at `last` ends before that context.
        """
        ...

    def steady_until(self, index: int) -> int:
        """Ids from `index` to below this one have the start of that at `index`, and none ahead."""
        ...

    def windows(self, stop: int) -> list[Window]:
        """All states in which ids 0:stop are computed, in order."""
        ...


@dataclass(frozen=True, slots=True)
class ExactSchedule:
    """Every context starts at 0: nothing is forgotten."""

    name: str = "exact"

    def start(self, index: int) -> int:  # noqa: ARG002
        return 0

    def ahead(self, index: int, last: int) -> int | None:  # noqa: ARG002
        return None

    def steady_until(self, index: int) -> int:  # noqa: ARG002
        return sys.maxsize

    def windows(self, stop: int) -> list[Window]:
        return [Window(0, 0, stop)]


@dataclass(frozen=True, slots=True)
class RenewalSchedule:
    """Contexts of at most `window` ids; each starts with the last `kept` ids of the one before.

    kept: at most half of the window.
    """

    window: int
    kept: int

    @property
    def name(self) -> str:
        return f"renew {self.kept}/{self.window}"

    @property
    def stride(self) -> int:
        """Ids between two renewals."""
        return self.window - self.kept

    def start(self, index: int) -> int:
        if index < self.window:
            return 0
        return (index - self.kept) // self.stride * self.stride

    def ahead(self, index: int, last: int) -> int | None:
        begin = self.start(index) + self.stride
        return begin if index >= begin and last >= begin + self.kept else None

    def steady_until(self, index: int) -> int:
        return max(index, self.start(index) + self.stride)

    def windows(self, stop: int) -> list[Window]:
        bounds = [0, *range(self.window, stop, self.stride), stop]
        return [Window(self.start(first), first, last) for first, last in pairwise(bounds)]


KEPT_PART = 4
"""R = W / 4: a third of an id is prefilled again for each id."""


def context_schedules(window: int | None) -> Mapping[ContextPolicy, ContextSchedule]:
    """The schedule of each policy, for a model that was trained on `window` ids, at least 2.

    None: the window is not known, and there is no renewal.
    """
    if window is None:
        return {"exact": ExactSchedule()}
    return {"exact": ExactSchedule(), "renew": RenewalSchedule(window, max(1, window // KEPT_PART))}


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """Prefill ids begin:stop into a row whose state is of ids start:begin.

    The row is cleared first where begin is start. is_spare: into the spare row, for the context
    after the next renewal. scored_from: ids from here on give the log-probabilities of the ids that
    follow them.
    """

    start: int
    begin: int
    stop: int
    is_spare: bool = False
    scored_from: int = 0


def prefill_spans(
    schedule: ContextSchedule, held: int, stop: int, last: int, *, is_scored: bool
) -> deque[PrefillSpan]:
    """What to prefill, in order, to advance a row from the state of ids 0:held to that of 0:stop.

    last: index of the last id that the sequence can reach. is_scored: every id is computed, where
    otherwise those that the last id's context has forgotten are skipped. Empty if held is stop.
    """
    if held == stop:
        return deque()
    if is_scored:
        main = [
            PrefillSpan(w.start, w.start, w.stop, scored_from=w.first)
            for w in schedule.windows(stop)
        ]
    else:
        start = schedule.start(stop - 1)
        goes_on = held > 0 and schedule.start(held - 1) == start
        main = [PrefillSpan(start, held if goes_on else start, stop)]
    begin = schedule.ahead(stop - 1, last)
    spare = [] if begin is None else [PrefillSpan(begin, begin, stop, is_spare=True)]
    return deque([*spare, *main])

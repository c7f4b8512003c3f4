"""The last events that a session's turn told, for whoever missed them.

Owns their numbers and how many are kept. Does not know what they say.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Self

from cottention.engine.errors import SnapshotError


@dataclass(frozen=True, slots=True)
class EventLog:
    """Events in the order they were told, each its bytes; of many the oldest have gone.

    turn: 16 hex digits, those of no other turn; empty where no turn kept any. first: the number of
    the oldest event that is here, counted from 0 in its turn.
    """

    turn: str = ""
    first: int = 0
    events: tuple[bytes, ...] = ()

    @classmethod
    def unpacked(cls, turn: str, first: int, sizes: Sequence[int], joined: bytes) -> Self:
        """Joined events apart again. SnapshotError: their sizes are not those of their bytes."""
        if sum(sizes) != len(joined) or min(sizes, default=1) < 1:
            raise SnapshotError("the snapshot's events have other sizes than it says")
        if not turn and (joined or first):
            raise SnapshotError("the snapshot has events of no turn")
        places = pairwise(accumulate(sizes, initial=0))
        return cls(turn, first, tuple(joined[a:b] for a, b in places))

    @property
    def nbytes(self) -> int:
        """Bytes of all events."""
        return sum(map(len, self.events))


class EventBuffer:
    """An outbox that grows: what it holds stays under `max_bytes`, but for the newest event."""

    def __init__(self, turn: str, max_bytes: int) -> None:
        self.turn = turn
        self._max_bytes = max_bytes
        self._events: deque[bytes] = deque()
        self._num_bytes = 0
        self.first = 0

    @property
    def stop(self) -> int:
        """The number that the next event will have."""
        return self.first + len(self._events)

    def add(self, event: bytes) -> None:
        """The newest; the oldest go where there is no room for them."""
        self._events.append(event)
        self._num_bytes += len(event)
        while self._num_bytes > self._max_bytes and len(self._events) > 1:
            self._num_bytes -= len(self._events.popleft())
            self.first += 1

    def since(self, number: int) -> list[bytes]:
        """The event of this number, from `first` on, and those after it."""
        return [self._events[place] for place in range(number - self.first, len(self._events))]

    def kept(self, *more: bytes) -> EventLog:
        """What it would be with these events at its end; it stays as it is."""
        twin = EventBuffer(self.turn, self._max_bytes)
        twin.first, twin._events, twin._num_bytes = self.first, self._events.copy(), self._num_bytes
        for event in more:
            twin.add(event)
        return EventLog(twin.turn, twin.first, tuple(twin._events))

"""The last events of a session's turn, kept for clients that missed them.

`EventLog` is the finished value, `EventBuffer` collects the events of a turn that runs.
"""

import struct
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import Self

from cottention.engine.errors import SnapshotError

_HEADER = struct.Struct("<16sQI")
"""Turn, number of the first event, number of events; their sizes and bytes follow."""


@dataclass(frozen=True, slots=True)
class EventLog:
    """Events of one turn in the order they were sent; where there were many, the newest of them.

    turn: 16 hex digits, unique to the turn; empty where no events were kept. first: the number of
    the oldest event that is kept, counted from 0 in its turn. events: the bytes of each.
    """

    turn: str = ""
    first: int = 0
    events: tuple[bytes, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all events."""
        return sum(map(len, self.events))

    def to_bytes(self) -> bytes:
        """The log as it is stored; empty bytes where it has no turn."""
        if not self.turn:
            return b""
        sizes = struct.pack(f"<{len(self.events)}I", *map(len, self.events))
        header = _HEADER.pack(self.turn.encode(), self.first, len(self.events))
        return b"".join([header, sizes, *self.events])

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """The inverse of `to_bytes`. SnapshotError: the sizes do not agree with the bytes."""
        if not raw:
            return cls()
        try:
            turn, first, num_events = _HEADER.unpack_from(raw)
            sizes = struct.unpack_from(f"<{num_events}I", raw, _HEADER.size)
        except struct.error as error:
            raise SnapshotError("the stored event log is cut short") from error
        start = _HEADER.size + 4 * num_events
        if start + sum(sizes) != len(raw):
            raise SnapshotError("the stored event log has other sizes than its header says")
        bounds = pairwise(accumulate(sizes, initial=start))
        return cls(turn.decode("ascii", "replace"), first, tuple(raw[a:b] for a, b in bounds))


NO_EVENTS = EventLog()


def leading(events: Iterable[bytes], start: int, max_bytes: int) -> list[bytes]:
    """Events from index `start` on: as many as fit into `max_bytes`, and at least one."""
    found: list[bytes] = []
    for event in islice(events, start, None):
        max_bytes -= len(event)
        if found and max_bytes < 0:
            break
        found.append(event)
    return found


class EventBuffer:
    """The events of a turn that runs: the newest ones, as many as fit into `max_bytes`.

    The newest event is kept even where it alone is larger.
    """

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
        """Append an event; the oldest are dropped where there is no room for them."""
        self._events.append(event)
        self._num_bytes += len(event)
        while self._num_bytes > self._max_bytes and len(self._events) > 1:
            self._num_bytes -= len(self._events.popleft())
            self.first += 1

    def since(self, number: int, max_bytes: int) -> list[bytes]:
        """The event of this number, which is at least `first`, and as many of those after it as
        fit into `max_bytes` with it.
        """
        return leading(self._events, number - self.first, max_bytes)

    def to_log(self, *more: bytes) -> EventLog:
        """The log of a turn that ends with these further events. The buffer is not changed."""
        ended = EventBuffer(self.turn, self._max_bytes)
        ended.first, ended._num_bytes = self.first, self._num_bytes
        ended._events = self._events.copy()
        for event in more:
            ended.add(event)
        return EventLog(ended.turn, ended.first, tuple(ended._events))

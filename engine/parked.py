"""States that wait in memory for their sessions' next turns; the least recently used goes first.

Owns the budget, and which sessions hold which state: forks hold one together. Does not know disks
or leases, and is not safe to share between threads: who owns it locks.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from cottention.engine.capacity import COUNT_BYTES, ID_BYTES
from cottention.engine.session_state import SessionState


@dataclass(slots=True)
class _Place:
    """A state, what it costs, and the sessions that hold it."""

    state: SessionState
    nbytes: int
    holders: set[str] = field(default_factory=set)


class Parked:
    """At most `max_bytes` of states by digest. `num_bytes`: of those that are here."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._places: OrderedDict[str, _Place] = OrderedDict()
        self._digests: dict[str, str] = {}  # session → digest
        self.num_bytes = 0

    @property
    def num_sessions(self) -> int:
        """Sessions whose state is here."""
        return len(self._digests)

    def holds(self, session_id: str) -> bool:
        """Whether the session's state is here."""
        return session_id in self._digests

    def get(self, digest: str) -> SessionState | None:
        """The state if it is here; it becomes the most recently used."""
        place = self._places.get(digest)
        if place is None:
            return None
        self._places.move_to_end(digest)
        return place.state

    def hold(self, session_id: str, digest: str, state: SessionState) -> None:
        """The session's state is now this one; the older one goes unless another holds it."""
        self.let_go(session_id)
        place = self._places.get(digest)
        if place is None:
            place = self._places[digest] = _Place(state, _nbytes(state))
            self.num_bytes += place.nbytes
        self._places.move_to_end(digest)
        place.holders.add(session_id)
        self._digests[session_id] = digest
        while self.num_bytes > self._max_bytes:
            self._drop(next(iter(self._places)))

    def let_go(self, session_id: str) -> None:
        """The session holds nothing here."""
        digest = self._digests.pop(session_id, None)
        if digest is None:
            return
        holders = self._places[digest].holders
        holders.discard(session_id)
        if not holders:
            self._drop(digest)

    def _drop(self, digest: str) -> None:
        place = self._places.pop(digest)
        self.num_bytes -= place.nbytes
        for session_id in place.holders:
            del self._digests[session_id]


def _nbytes(state: SessionState) -> int:
    num_ids = len(state.pending) + len(state.recent)
    nbytes = state.nbytes + state.outbox.nbytes
    return nbytes + num_ids * ID_BYTES + len(state.counts) * COUNT_BYTES

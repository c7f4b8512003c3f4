"""Where the value of each session is: with a turn, in memory, in the store.

Owns the lock over what is in memory, never held while the disk works. Does not know owners, or
what a caller may do.

States that wait in memory for their sessions' next turns; the least recently used goes first.

Owns the budget, and which sessions hold which state: forks hold one together. Does not know disks
or leases, and is not safe to share between threads: who owns it locks.

Values that the store had no room for, and how far ahead of it they are.

Owns that a rewind never skips a turn: of what is ahead only the newest value is kept. Does not know
disks or leases, and is not safe to share between threads: who owns it locks.
"""

import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from cottention.engine.errors import NothingToRewindError, SessionMovedError, StoreFullError
from cottention.engine.sessions.memory_usage import COUNT_BYTES, ID_BYTES
from cottention.engine.sessions.snapshot import SnapshotCodec
from cottention.engine.sessions.store import Lease, SessionRecord, SessionStore
from cottention.engine.sessions.types import Exported, Residence, Session, SessionCounts
from cottention.engine.state.context_window import ContextPolicy
from cottention.engine.state.session_state import SessionState

logger = logging.getLogger(__name__)


class UnsavedState(NamedTuple):
    """A session's value after `num_turns` more turns than the store's."""

    state: SessionState
    num_turns: int

    def checkpoints(self, record: SessionRecord) -> tuple[str, ...]:
        """Digests of what it can be rewound to, the newest last."""
        return (*record.checkpoints, record.head) if self.num_turns == 1 else ()


class UnsavedStates:
    """The newest value of each session that the store does not have."""

    def __init__(self) -> None:
        self._found: dict[str, UnsavedState] = {}

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._found

    def __len__(self) -> int:
        return len(self._found)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows of all."""
        return sum(ahead.state.nbytes for ahead in self._found.values())

    def get(self, session_id: str) -> UnsavedState | None:
        """Of this session; None where the store has its value."""
        return self._found.get(session_id)

    def all(self) -> dict[str, UnsavedState]:
        """Of all sessions, by id."""
        return dict(self._found)

    def move(self, session_id: str, state: SessionState) -> None:
        """The value after one more turn, in place of the one before it."""
        before = self._found.get(session_id)
        self._found[session_id] = UnsavedState(state, 1 + (before.num_turns if before else 0))

    def rewind(self, session_id: str) -> bool:
        """Go back to what the store has; whether there was something newer.

        NothingToRewindError: the store's is more than a turn older.
        """
        ahead = self._found.get(session_id)
        if ahead is not None and ahead.num_turns > 1:
            raise NothingToRewindError(
                "the session as it was before its last turn is not kept: the disk was full"
            )
        return self.forget(session_id)

    def forget(self, session_id: str) -> bool:
        """The store has it, or the session is gone; whether there was something."""
        return self._found.pop(session_id, None) is not None


@dataclass(slots=True)
class _Place:
    """A state, what it costs, and the sessions that hold it."""

    state: SessionState
    nbytes: int
    holders: set[str] = field(default_factory=set)


class ParkedStates:
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


class StateCache:
    """States by session, newest first: ahead of the store, parked, stored."""

    def __init__(
        self, store: SessionStore, codec: SnapshotCodec, memory_bytes: int, *, is_durable: bool
    ) -> None:
        self._store = store
        self._codec = codec
        self._is_durable = is_durable
        self._lock = threading.Lock()
        self._parked = ParkedStates(memory_bytes)
        self._running: dict[str, Lease] = {}
        self._unreleased: dict[str, Lease] = {}
        self._ahead = UnsavedStates()

    def start(self, session_id: str, seconds: float) -> Lease:
        """A turn runs, under this lease. SessionBusyError; StoreFullError."""
        self._release_again(session_id)
        lease = self._store.acquire(session_id, seconds)
        with self._lock:
            self._running[session_id] = lease
        return lease

    def end(self, lease: Lease) -> None:
        """No turn runs under this lease any more; nothing happens where none did.

        What the turn did stands, whatever the disk says to this: the next turn gives the lease back
        first, and it runs out by itself.
        """
        try:
            self._store.release(lease)
        except StoreFullError:
            logger.exception("session %s is free once the disk has room", lease.session_id)
            with self._lock:
                self._unreleased[lease.session_id] = lease
        finally:
            with self._lock:
                if self._running.get(lease.session_id) == lease:
                    del self._running[lease.session_id]

    def _release_again(self, session_id: str) -> None:
        with self._lock:
            lease = self._unreleased.get(session_id)
        if lease is not None:
            self._store.release(lease)
            with self._lock:
                if self._unreleased.get(session_id) == lease:
                    del self._unreleased[session_id]

    def running(self) -> list[Lease]:
        """Of the turns that run."""
        with self._lock:
            return [*self._running.values()]

    def load(self, record: SessionRecord) -> SessionState:
        """From wherever it is, and it stays there. SnapshotError: damaged on the disk."""
        with self._lock:
            ahead = self._ahead.get(record.id)
            state = ahead.state if ahead else self._parked.get(record.head)
        return state or self._codec.decode(self._store.get(record.head))

    def wake(self, record: SessionRecord) -> SessionState:
        """As `load`, for the turn that holds its lease: what was on the disk alone is parked."""
        state = self.load(record)
        with self._lock:
            if record.id not in self._ahead:
                self._parked.hold(record.id, record.head, state)
        return state

    def park(self, record: SessionRecord, state: SessionState) -> None:
        """The store has it, and memory too."""
        with self._lock:
            self._ahead.forget(record.id)
            self._parked.hold(record.id, record.head, state)

    def pin(self, lease: Lease, state: SessionState) -> None:
        """The store had no room for it: it stays in memory, whatever the budget.

        SessionMovedError: the turn has ended. A full store may not have come to look at the fence.
        """
        with self._lock:
            if self._running.get(lease.session_id) != lease:
                raise SessionMovedError(f"session {lease.session_id!r} is not held by this turn")
            self._parked.let_go(lease.session_id)
            self._ahead.move(lease.session_id, state)
        logger.warning(
            "the disk has no room for session %s: its last turn is lost if the server ends before a"
            " later one is stored",
            lease.session_id,
        )

    def unpin(self, session_id: str) -> bool:
        """Go back a turn to what the store has; whether there was something newer.

        NothingToRewindError: the store's is more than a turn older.
        """
        with self._lock:
            return self._ahead.rewind(session_id)

    def ahead(self, session_id: str) -> UnsavedState | None:
        """What the store has no room for, of this session."""
        with self._lock:
            return self._ahead.get(session_id)

    def all_ahead(self) -> dict[str, UnsavedState]:
        """What the store has no room for, by session."""
        with self._lock:
            return self._ahead.all()

    def exported(self, record: SessionRecord) -> Exported:
        """It and its snapshot. SnapshotError: damaged on the disk, or no longer there."""
        ahead = self.ahead(record.id)
        raw = self._codec.encode(ahead.state) if ahead else self._store.get(record.head)
        return Exported(self._told(record, ahead), raw)

    def forget(self, session_id: str) -> None:
        """The session is gone, or not at what memory has."""
        with self._lock:
            self._ahead.forget(session_id)
            self._unreleased.pop(session_id, None)
            self._parked.let_go(session_id)

    def told(self, record: SessionRecord) -> Session:
        """A record, and what only memory knows of its session."""
        return self._told(record, self.ahead(record.id))

    def _told(self, record: SessionRecord, ahead: UnsavedState | None) -> Session:
        with self._lock:
            residence = self._residence(record.id)
        position, policy = record.position, cast("ContextPolicy", record.context_policy)
        if ahead is not None:
            position, policy = ahead.state.num_tokens, ahead.state.context_policy
        return Session(
            id=record.id,
            owner=record.owner,
            created=record.created,
            version=record.version,
            position=position,
            nbytes=record.nbytes,
            residence=residence,
            metadata=record.metadata,
            expires_at=record.expires_at,
            num_checkpoints=len(ahead.checkpoints(record) if ahead else record.checkpoints),
            is_durable=self._is_durable and ahead is None,
            was_interrupted=record.was_interrupted and ahead is None,
            context_policy=policy,
            context_start=self._codec.context_schedules[policy].start(max(position - 1, 0)),
        )

    def sizes(self) -> SessionCounts:
        """How many there are of each residence, and their bytes."""
        counts = self._store.counts()
        with self._lock:
            num_running = len(self._running)
            in_memory = self._parked.num_sessions + len(self._ahead)
            num_parked = in_memory - sum(map(self._is_in_memory, self._running))
            num_unsaved = len(self._ahead)
            nbytes = self._parked.num_bytes + self._ahead.nbytes
        num_stored = max(0, counts.num_sessions - num_running - num_parked)
        return SessionCounts(
            num_running, num_parked, num_stored, nbytes, counts.blob_bytes, num_unsaved
        )

    def _is_in_memory(self, session_id: str) -> bool:
        return session_id in self._ahead or self._parked.holds(session_id)

    def _residence(self, session_id: str) -> Residence:
        if session_id in self._running:
            return "resident"
        return "parked" if self._is_in_memory(session_id) else "stored"

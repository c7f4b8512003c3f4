"""Where the value of each session is: with a turn, in memory, in the store.

Owns the lock over what is in memory, never held while the disk works. Does not know owners, or
what a caller may do.
"""

import logging
import threading
from typing import cast

from cottention.engine.ahead import Ahead, AheadOfStore
from cottention.engine.errors import SessionMovedError, StoreFullError
from cottention.engine.parked import Parked
from cottention.engine.renewal import ContextPolicy
from cottention.engine.session import Exported, Residence, Session, SessionCounts
from cottention.engine.session_state import SessionState
from cottention.engine.snapshot import SnapshotCodec
from cottention.engine.store import Lease, Record, SessionStore

logger = logging.getLogger(__name__)


class Holdings:
    """States by session, newest first: ahead of the store, parked, stored."""

    def __init__(
        self, store: SessionStore, codec: SnapshotCodec, memory_bytes: int, *, is_durable: bool
    ) -> None:
        self._store = store
        self._codec = codec
        self._is_durable = is_durable
        self._lock = threading.Lock()
        self._parked = Parked(memory_bytes)
        self._running: dict[str, Lease] = {}
        self._unreleased: dict[str, Lease] = {}
        self._ahead = AheadOfStore()

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

    def load(self, record: Record) -> SessionState:
        """From wherever it is, and it stays there. SnapshotError: damaged on the disk."""
        with self._lock:
            ahead = self._ahead.get(record.id)
            state = ahead.state if ahead else self._parked.get(record.head)
        return state or self._codec.decode(self._store.get(record.head))

    def wake(self, record: Record) -> SessionState:
        """As `load`, for the turn that holds its lease: what was on the disk alone is parked."""
        state = self.load(record)
        with self._lock:
            if record.id not in self._ahead:
                self._parked.hold(record.id, record.head, state)
        return state

    def park(self, record: Record, state: SessionState) -> None:
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

    def ahead(self, session_id: str) -> Ahead | None:
        """What the store has no room for, of this session."""
        with self._lock:
            return self._ahead.get(session_id)

    def all_ahead(self) -> dict[str, Ahead]:
        """What the store has no room for, by session."""
        with self._lock:
            return self._ahead.all()

    def exported(self, record: Record) -> Exported:
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

    def told(self, record: Record) -> Session:
        """A record, and what only memory knows of its session."""
        return self._told(record, self.ahead(record.id))

    def _told(self, record: Record, ahead: Ahead | None) -> Session:
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
            context_start=self._codec.grids[policy].start(max(position - 1, 0)),
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

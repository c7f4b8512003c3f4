"""The life of sessions: opened, continued in turns, forked, rewound, moved, closed.

Owns who may see a session, where its value is found (running, parked, stored) and the order of a
turn: a lease, a value, and a new value put in the place of the one that was read. Does not know
how values are computed, nor how and where a store keeps them.

Every verb may block on the disk and may be called from any thread. What has returned is kept; what
raised has changed nothing.
"""

import threading
import time
from collections.abc import Mapping

from engine.errors import SessionMovedError, SessionNotFoundError, SnapshotError, StoreFullError
from engine.session import Residence, Session, SessionCounts, Turn
from engine.session_state import SessionState
from engine.session_values import SessionValues
from engine.snapshot import SnapshotCodec
from engine.store import Lease, NewSession, Record, SessionStore

LEASE_SECONDS = 24 * 3600.0
"""Longer than any turn. A dead process' leases end with its lock, not with their time."""


class Sessions:
    """All sessions of a store."""

    def __init__(
        self,
        store: SessionStore,
        codec: SnapshotCodec,
        *,
        memory_bytes: int,
        max_checkpoints: int,
        is_durable: bool,
    ) -> None:
        """memory_bytes: of parked values. max_checkpoints: turns that can be taken back."""
        self._store = store
        self._codec = codec
        self._values = SessionValues(store, codec, memory_bytes)
        self._max_checkpoints = max_checkpoints
        self._is_durable = is_durable
        self._running: dict[str, Lease] = {}
        self._lock = threading.Lock()

    def open(
        self,
        owner: str,
        state: SessionState,
        metadata: Mapping[str, str],
        ttl_seconds: float | None,
    ) -> Session:
        """A new session that holds `state`. Raises StoreFullError."""
        now = time.time()
        self._store.expire(now)
        raw = self._codec.encode(state)
        until = None if ttl_seconds is None else now + ttl_seconds
        new = NewSession(owner, state.num_tokens, raw, metadata=metadata, expires_at=until)
        [record] = self._store.create([new])
        self._values.took(record, state)
        return self._session(record)

    def find(self, owner: str, session_id: str) -> Session:
        """Raises SessionNotFoundError, for another owner's session too."""
        return self._session(self._record(owner, session_id))

    def page(self, owner: str, after: str | None, limit: int) -> tuple[list[Session], bool]:
        """An owner's sessions, newest first, behind the one called `after`; are there more?"""
        records, has_more = self._store.list(owner, after, limit)
        return [self._session(record) for record in records], has_more

    def delete(self, owner: str, session_id: str) -> None:
        """Raises SessionNotFoundError, SessionBusyError."""
        self._record(owner, session_id)
        self._store.delete(session_id)
        self._values.drop(session_id)

    def begin(self, owner: str, session_id: str, expected_position: int | None = None) -> Turn:
        """Take the session for a turn; `commit` or `abandon` must follow.

        Raises SessionNotFoundError, SessionBusyError, SessionMovedError where it is not at the
        expected position, SnapshotError where its bytes are damaged.
        """
        self._record(owner, session_id)
        lease = self._store.acquire(session_id, LEASE_SECONDS)
        try:
            record = self._record(owner, session_id)
            _check_position(self._values.position(record), expected_position)
            state = self._values.of(record)
        except BaseException:
            self._store.release(lease)
            raise
        with self._lock:
            self._running[session_id] = lease
        return Turn(self._session(record), state, lease)

    def commit(self, turn: Turn, state: SessionState) -> Session:
        """End a turn with a new value. On a full disk the value is kept in memory alone."""
        name = turn.session.id
        try:
            raw = self._codec.encode(state)
            record = self._store.put(
                turn.lease, turn.lease.version, raw, state.num_tokens, self._max_checkpoints
            )
            self._values.took(record, state)
        except StoreFullError:
            record = self._store.record(name)
            self._values.hold(name, state)
        finally:
            self.abandon(turn)
        return self._session(record)

    def abandon(self, turn: Turn) -> None:
        """End a turn without a new value: the session is as before it. May be called again."""
        with self._lock:
            self._running.pop(turn.session.id, None)
        self._store.release(turn.lease)

    def fork(
        self, owner: str, session_id: str, n: int, expected_position: int | None = None
    ) -> list[Session]:
        """n sessions that hold what this one holds and go on by themselves.

        Raises as `begin` does, and StoreFullError.
        """
        turn = self.begin(owner, session_id, expected_position)
        try:
            record = self._store.record(session_id)
            new = self._values.twin(record)
            return [self._session(made) for made in self._store.create([new] * n)]
        finally:
            self.abandon(turn)

    def rewind(self, owner: str, session_id: str, expected_position: int | None = None) -> Session:
        """Back to before the last turn. Raises as `begin` does, and NothingToRewindError."""
        turn = self.begin(owner, session_id, expected_position)
        try:
            if not self._values.drop(session_id):
                self._store.rewind(turn.lease, turn.lease.version)
        finally:
            self.abandon(turn)
        return self.find(owner, session_id)

    def export(self, owner: str, session_id: str) -> bytes:
        """A snapshot, of before the turn where one is running."""
        record = self._record(owner, session_id)
        try:
            return self._values.raw(record)
        except SnapshotError:
            if self._record(owner, session_id).head == record.head:
                raise
        return self.export(owner, session_id)  # a turn ended meanwhile, and that head is gone

    def import_(
        self, owner: str, raw: bytes, metadata: Mapping[str, str], ttl_seconds: float | None
    ) -> Session:
        """A new session from a snapshot. Raises SnapshotError, SnapshotMismatchError."""
        return self.open(owner, self._codec.decode(raw), metadata, ttl_seconds)

    def sizes(self) -> SessionCounts:
        """Figures of this moment."""
        stored = self._store.counts()
        return SessionCounts(
            num_resident=len(self._running),
            num_parked=len(self._values.parked),
            num_stored=stored.num_sessions,
            parked_bytes=self._values.parked.nbytes,
            stored_bytes=stored.blob_bytes,
        )

    def close(self) -> None:
        """End what runs as if it had not begun, and let go of the store."""
        with self._lock:
            for lease in self._running.values():
                self._store.release(lease)
        self._store.close()

    def _record(self, owner: str, session_id: str) -> Record:
        record = self._store.record(session_id)
        if record.owner != owner:
            raise SessionNotFoundError(f"there is no session {session_id!r:.80}")
        return record

    def _residence(self, record: Record) -> Residence:
        if record.id in self._running:
            return "resident"
        return "parked" if self._values.is_in_memory(record) else "stored"

    def _session(self, record: Record) -> Session:
        is_durable = self._is_durable and self._values.is_stored(record)
        position = self._values.position(record)
        return Session.of(record, position, self._residence(record), is_durable)


def _check_position(position: int, expected: int | None) -> None:
    if expected not in (None, position):
        raise SessionMovedError(f"the session is at position {position}, not at {expected}")

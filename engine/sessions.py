"""Every verb of a session: open, begin and commit a turn, fork, rewind, export, import, delete.

Owns who may do what and when, and what is undone when it fails. Thread-safe; calls wait for the
disk. Does not know what computes a turn, HTTP, or where a session's value is at a time.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from engine.errors import (
    SessionError,
    SessionMovedError,
    SessionNotFoundError,
    SnapshotError,
    StoreFullError,
)
from engine.holdings import Holdings
from engine.session import Session, SessionCounts, Turn
from engine.session_state import SessionState
from engine.snapshot import SnapshotCodec
from engine.store import Lease, NewSession, Record, SessionStore

__all__ = ["Session", "SessionCounts", "Sessions", "Turn"]
Metadata = Mapping[str, str]

LEASE_SECONDS = 86_400.0
"""Longer than a turn: a process that dies is found out by its lock, not by waiting."""


class Sessions:
    """The sessions of a store, as their owners may see and change them.

    memory_bytes: of states kept in memory between turns. max_checkpoints: turns that can be taken
    back. is_durable: whether the store survives a loss of power.
    """

    def __init__(
        self,
        store: SessionStore,
        codec: SnapshotCodec,
        *,
        memory_bytes: int,
        max_checkpoints: int,
        is_durable: bool,
    ) -> None:
        self._store = store
        self._codec = codec
        self._max_checkpoints = max_checkpoints
        self._holdings = Holdings(store, codec, memory_bytes, is_durable=is_durable)

    def open(
        self, owner: str, state: SessionState, metadata: Metadata, ttl_seconds: float | None
    ) -> Session:
        """A new session of this value. StoreFullError."""
        return self._create(owner, self._codec.encode(state), state, metadata, ttl_seconds)

    def import_(
        self, owner: str, raw: bytes, metadata: Metadata, ttl_seconds: float | None
    ) -> Session:
        """A new session of a snapshot. SnapshotError, before anything is stored; StoreFullError."""
        return self._create(owner, raw, self._codec.decode(raw), metadata, ttl_seconds)

    def export(self, owner: str, session_id: str) -> bytes:
        """The snapshot of it as it was after its last turn. SnapshotError: it is damaged."""
        record = self._record(owner, session_id)
        try:
            return self._holdings.raw(record)
        except SnapshotError:
            if self._record(owner, session_id).head == record.head:
                raise
        return self.export(owner, session_id)  # a turn ended meanwhile, and that head is gone

    def find(self, owner: str, session_id: str) -> Session:
        """SessionNotFoundError also where it is somebody else's."""
        return self._holdings.told(self._record(owner, session_id))

    def page(self, owner: str, after: str | None, limit: int) -> tuple[list[Session], bool]:
        """The owner's sessions behind `after`, newest first; whether there are more."""
        records, has_more = self._store.list(owner, after, limit)
        return [self._holdings.told(record) for record in records], has_more

    def delete(self, owner: str, session_id: str) -> None:
        """SessionBusyError while a turn runs."""
        self._record(owner, session_id)
        self._store.delete(session_id)
        self._holdings.forget(session_id)

    def begin(self, owner: str, session_id: str, expected_position: int | None = None) -> Turn:
        """A turn, to be ended by commit or abandon.

        SessionBusyError: another runs. SessionMovedError: it is not at `expected_position`.
        """
        self._record(owner, session_id)
        lease = self._store.acquire(session_id, LEASE_SECONDS)
        self._holdings.start(lease)
        try:
            record = self._record(owner, session_id)
            session = self._holdings.told(record)
            if expected_position not in (None, session.position):
                where = f"session {session_id!r} is at position {session.position}"
                raise SessionMovedError(f"{where}, not at {expected_position}")
            return Turn(session, self._holdings.load(record), lease)
        except BaseException:
            self._holdings.end(lease)
            raise

    def commit(self, turn: Turn, state: SessionState) -> Session:
        """The turn's outcome is the session's value, and is on the disk when this returns.

        Where the disk is full it stays in memory and the session says that it is not durable,
        until a later turn is stored. SessionMovedError: the lease was taken over.
        """
        try:
            record = self._save(turn.lease, state)
        except StoreFullError:
            self._holdings.pin(turn.lease, state)
            record = self._record(turn.session.owner, turn.session.id)
        finally:
            self._holdings.end(turn.lease)
        return self._holdings.told(record)

    def abandon(self, turn: Turn) -> None:
        """The session is as before the turn; nothing happens where the turn has ended."""
        self._holdings.end(turn.lease)

    def fork(
        self, owner: str, session_id: str, n: int, expected_position: int | None = None
    ) -> list[Session]:
        """n sessions that go on from here, each with its own turns to take back."""
        with self._held(owner, session_id, expected_position) as turn:
            record = self._store.record(session_id)
            made = self._store.create([self._holdings.twin(record, turn.state)] * n)
            return [self._park(fork, turn.state) for fork in made]

    def rewind(self, owner: str, session_id: str, expected_position: int | None = None) -> Session:
        """Back to before the last turn. NothingToRewindError; SessionMovedError as in `begin`.

        Turns for which the disk was full have no checkpoints: they are taken back together.
        """
        with self._held(owner, session_id, expected_position) as turn:
            if self._holdings.unpin(session_id):
                record = self._store.record(session_id)
            else:
                record = self._store.rewind(turn.lease, turn.lease.version)
                self._holdings.forget(session_id)
        return self._holdings.told(record)

    def sizes(self) -> SessionCounts:
        """How many there are of each residence, and their bytes."""
        return self._holdings.sizes()

    def close(self) -> None:
        """Abandon what runs, try once more to store what was not, and let go of the store."""
        for lease in self._holdings.running():
            self._holdings.end(lease)
        for session_id, state in self._holdings.unsaved().items():
            with suppress(SessionError):
                self._save(self._store.acquire(session_id, LEASE_SECONDS), state)
        self._store.close()

    @contextmanager
    def _held(
        self, owner: str, session_id: str, expected_position: int | None = None
    ) -> Iterator[Turn]:
        turn = self.begin(owner, session_id, expected_position)
        try:
            yield turn
        finally:
            self._holdings.end(turn.lease)

    def _create(
        self, owner: str, raw: bytes, state: SessionState, metadata: Metadata, ttl: float | None
    ) -> Session:
        now = time.time()
        self._store.expire(now)
        until = None if ttl is None else now + ttl
        how = metadata, until, state.context_policy
        [record] = self._store.create([NewSession(owner, state.num_tokens, raw, None, (), *how)])
        return self._park(record, state)

    def _save(self, lease: Lease, state: SessionState) -> Record:
        new = self._codec.encode(state), state.num_tokens, self._max_checkpoints
        record = self._store.put(lease, lease.version, *new, state.context_policy)
        self._holdings.park(record, state)
        return record

    def _record(self, owner: str, session_id: str) -> Record:
        try:
            record = self._store.record(session_id)
        except SessionNotFoundError:  # expired, it may still have something in memory
            self._holdings.forget(session_id)
            raise
        if record.owner != owner:
            raise SessionNotFoundError(f"there is no session {session_id!r}")
        return record

    def _park(self, record: Record, state: SessionState) -> Session:
        self._holdings.park(record, state)
        return self._holdings.told(record)

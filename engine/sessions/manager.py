"""Every verb that changes a session: open, begin and commit a turn, fork, rewind, import, delete.

Owns who may do what and when, and what is undone when it fails. Thread-safe; calls wait for the
disk. Does not know what computes a turn, HTTP, or where a session's value is at a time.

What the owner of a session may see of it, without changing anything.

Owns that another owner sees nothing, and that what is read is whole while turns end meanwhile. Does
not know turns.

How a session's value gets to the store, and which older ones stay beside it.

Owns that a rewind never skips a turn: where a value was not kept, those before it go. Does not know
who may change a session.

The last try to store what the disk had no room for, and a line in the log for what is lost.

Does not know what is stored, or how.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TypeVar

from cottention.engine.errors import (
    SessionError,
    SessionMovedError,
    SessionNotFoundError,
    SnapshotError,
    StoreFullError,
)
from cottention.engine.sessions.snapshot import SnapshotCodec
from cottention.engine.sessions.state_cache import StateCache, UnsavedState
from cottention.engine.sessions.store import Lease, NewSession, SessionRecord, SessionStore
from cottention.engine.sessions.types import Exported, Session, SessionCounts, Turn
from cottention.engine.state.event_log import EventLog
from cottention.engine.state.session_state import SessionState

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

MAX_NAMED = 5
"""Sessions that the line names, so that it stays a line."""


def save_all(unsaved: Mapping[str, Value], save: Callable[[str, Value], object]) -> None:
    """Save each by its id; all are tried, whatever becomes of one. What is lost is logged."""
    lost: dict[str, Exception] = {}
    for session_id, value in unsaved.items():
        try:
            save(session_id, value)
        except SessionNotFoundError:  # it is past its time: nobody will ask for it
            continue
        except Exception as error:
            lost[session_id] = error
    if lost:
        _tell(lost)


def _tell(lost: Mapping[str, Exception]) -> None:
    named, num_others = ", ".join([*lost][:MAX_NAMED]), len(lost) - MAX_NAMED
    reason = next(iter(lost.values()))
    logger.error(
        "the last turns of %d session(s) are lost, since they could not be stored: %s (%s); each is"
        " as it was before them: make room on the disk before the next start, then repeat them",
        len(lost),
        named if num_others <= 0 else f"{named} and {num_others} more",
        " ".join(str(reason).split()) or type(reason).__name__,
    )


Found = TypeVar("Found")


class SessionViews:
    """The sessions of a store, wherever they are. Thread-safe; calls wait for the disk."""

    def __init__(self, store: SessionStore, holdings: StateCache) -> None:
        self._store = store
        self._holdings = holdings

    def find(self, owner: str, session_id: str) -> Session:
        """SessionNotFoundError also where it is somebody else's."""
        return self._holdings.told(self._record(owner, session_id))

    def page(self, owner: str, after: str | None, limit: int) -> tuple[list[Session], bool]:
        """The owner's sessions behind `after`, newest first; whether there are more."""
        records, has_more = self._store.list(owner, after, limit)
        return [self._holdings.told(record) for record in records], has_more

    def export(self, owner: str, session_id: str) -> Exported:
        """It as it was after its last turn, and its bytes. SnapshotError: it is damaged."""
        return self._of_head(owner, session_id, self._holdings.exported)

    def outbox(self, owner: str, session_id: str) -> EventLog:
        """What its last turn told, where that was kept. SnapshotError: it is damaged."""
        return self._of_head(owner, session_id, lambda record: self._holdings.load(record).outbox)

    def sizes(self) -> SessionCounts:
        """How many there are of each residence, and their bytes."""
        return self._holdings.sizes()

    def _of_head(
        self, owner: str, session_id: str, read: Callable[[SessionRecord], Found]
    ) -> Found:
        record = self._record(owner, session_id)
        try:
            return read(record)
        except SnapshotError:
            if self._store.head(session_id) == record.version:
                raise
        return self._of_head(owner, session_id, read)  # a turn ended, and that head is gone

    def _record(self, owner: str, session_id: str) -> SessionRecord:
        try:
            record = self._store.record(session_id)
        except SessionNotFoundError:  # expired, it may still have something in memory
            self._holdings.forget(session_id)
            raise
        if record.owner != owner:
            raise SessionNotFoundError(f"no session {session_id!r}")
        return record


class Saving:
    """Puts values into the store, and into memory once they are there."""

    def __init__(
        self, store: SessionStore, codec: SnapshotCodec, holdings: StateCache, max_checkpoints: int
    ) -> None:
        self._store = store
        self._codec = codec
        self._holdings = holdings
        self._max_checkpoints = max_checkpoints

    def save(self, lease: Lease, state: SessionState) -> SessionRecord:
        """A turn's outcome, after that of an earlier turn for which there was no room.

        StoreFullError: not all of it is stored; SessionMovedError.
        """
        version, before = lease.version, self._holdings.ahead(lease.session_id)
        if before is not None:
            version = self._put(lease, version, before).version
        return self._put(lease, version, UnsavedState(state, 1))

    def twin(self, record: SessionRecord, state: SessionState) -> NewSession:
        """Another session of the same value and the same past, to be made."""
        ahead = self._holdings.ahead(record.id)
        return NewSession(
            record.owner,
            state.num_tokens,
            snapshot=self._codec.encode(state) if ahead else None,
            head=None if ahead else record.head,
            checkpoints=ahead.checkpoints(record) if ahead else record.checkpoints,
            metadata=record.metadata,
            expires_at=record.expires_at,
            context_policy=state.context_policy,
        )

    def save_rest(self, lease_seconds: float) -> None:
        """Try once more what there was no room for, as the last thing that is done."""

        def save(session_id: str, ahead: UnsavedState) -> None:
            lease = self._holdings.start(session_id, lease_seconds)
            self._put(lease, lease.version, ahead)

        if found := self._holdings.all_ahead():
            with suppress(Exception):  # then there is as much room as there was
                self._store.free_room()
            save_all(found, save)

    def _put(self, lease: Lease, version: int, ahead: UnsavedState) -> SessionRecord:
        state, num_turns = ahead
        new = self._codec.encode(state), state.num_tokens
        num_checkpoints = self._max_checkpoints if num_turns == 1 else 0
        record = self._store.put(lease, version, *new, num_checkpoints, state.context_policy)
        self._holdings.park(record, state)
        return record


__all__ = ["Session", "SessionCounts", "SessionManager", "Turn"]
Metadata = Mapping[str, str]

OutboxOf = Callable[[bool], EventLog]
"""What a turn told, given whether it is on the disk."""

Check = Callable[[SessionState], None]

LEASE_SECONDS = 60.0
"""After this long without `tend` another process of a shared store may take a turn for dead; that
it was not is then told by the fence. In a folder of one's own the lock proves it sooner."""

MAX_EXPIRED_AT_ONCE = 100


def nothing_told(_is_durable: bool) -> EventLog:
    """Of a turn whose events nobody will ask for."""
    return EventLog()


class SessionManager(SessionViews):
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
        super().__init__(store, StateCache(store, codec, memory_bytes, is_durable=is_durable))
        self._codec = codec
        self._saving = Saving(store, codec, self._holdings, max_checkpoints)
        self._is_durable = is_durable

    def open(
        self, owner: str, state: SessionState, metadata: Metadata, ttl_seconds: float | None
    ) -> Session:
        """A new session of this value. StoreFullError."""
        return self._create(owner, self._codec.encode(state), state, metadata, ttl_seconds)

    def import_(
        self, owner: str, raw: bytes, metadata: Metadata, ttl_seconds: float | None, check: Check
    ) -> Session:
        """A new session of a snapshot. SnapshotError, before anything is stored; StoreFullError.

        check: raises what it likes for a state that is of no use here, as early.
        """
        state = self._codec.decode(raw)
        check(state)
        return self._create(owner, raw, state, metadata, ttl_seconds)

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
        lease = self._holdings.start(session_id, LEASE_SECONDS)
        try:
            record = self._record(owner, session_id)
            session = self._holdings.told(record)
            if expected_position not in (None, session.position):
                where = f"session {session_id!r} is at position {session.position}"
                raise SessionMovedError(f"{where}, not at {expected_position}")
            return Turn(session, self._holdings.wake(record), lease)
        except BaseException:
            self._holdings.end(lease)
            raise

    def commit(self, turn: Turn, state: SessionState, outbox: OutboxOf = nothing_told) -> Session:
        """The turn's outcome is the session's value, and is on the disk when this returns.

        outbox: what is kept of what the turn told; of earlier turns nothing is.
        Where the disk is full the state stays in memory and the session says that it is not
        durable, until a later turn is stored. SessionMovedError: the lease was taken over.
        """
        try:
            record = self._saving.save(turn.lease, replace(state, outbox=outbox(self._is_durable)))
        except StoreFullError:
            self._holdings.pin(turn.lease, replace(state, outbox=outbox(False)))
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
            made = self._store.create([self._saving.twin(record, turn.state)] * n)
            return [self._park(fork, turn.state) for fork in made]

    def rewind(self, owner: str, session_id: str, expected_position: int | None = None) -> Session:
        """Back to before the last turn. NothingToRewindError; SessionMovedError as in `begin`.

        Of the turns for which the disk was full only the first can be taken back, and only as long
        as it is the last: the values between it and the newest are not kept.
        """
        with self._held(owner, session_id, expected_position) as turn:
            if self._holdings.unpin(session_id):
                record = self._store.record(session_id)
            else:
                record = self._store.rewind(turn.lease, turn.lease.version)
                self._holdings.forget(session_id)
        return self._holdings.told(record)

    def tend(self) -> bool:
        """Make the leases of running turns last on, and delete a portion of what is past its time.

        To be called more often than every LEASE_SECONDS; whether more is past its time.
        """
        for lease in self._holdings.running():
            with suppress(SessionError):  # it has just ended, or its commit will tell what is wrong
                self._store.renew(lease, LEASE_SECONDS)
        expired = self._store.expire(time.time(), MAX_EXPIRED_AT_ONCE)
        for session_id in expired:
            self._holdings.forget(session_id)
        return len(expired) == MAX_EXPIRED_AT_ONCE

    def close(self) -> None:
        """Abandon what runs, try once more to store what was not, and let go of the store."""
        try:
            for lease in self._holdings.running():
                with suppress(SessionError):  # the next start takes it back
                    self._holdings.end(lease)
            if self._is_durable:  # else they end with the server
                self._saving.save_rest(LEASE_SECONDS)
        finally:
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
        until = None if ttl is None else time.time() + ttl
        how = metadata, until, state.context_policy
        [record] = self._store.create([NewSession(owner, state.num_tokens, raw, None, (), *how)])
        return self._park(record, state)

    def _park(self, record: SessionRecord, state: SessionState) -> Session:
        self._holdings.park(record, state)
        return self._holdings.told(record)

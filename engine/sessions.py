"""Every verb that changes a session: open, begin and commit a turn, fork, rewind, import, delete.

Owns who may do what and when, and what is undone when it fails. Thread-safe; calls wait for the
disk. Does not know what computes a turn, HTTP, or where a session's value is at a time.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace

from cottention.engine.errors import SessionError, SessionMovedError, StoreFullError
from cottention.engine.holdings import Holdings
from cottention.engine.outbox import Outbox
from cottention.engine.saving import Saving
from cottention.engine.session import Session, SessionCounts, Turn
from cottention.engine.session_state import SessionState
from cottention.engine.session_views import SessionViews
from cottention.engine.snapshot import SnapshotCodec
from cottention.engine.store import NewSession, Record, SessionStore

__all__ = ["Session", "SessionCounts", "Sessions", "Turn"]
Metadata = Mapping[str, str]

OutboxOf = Callable[[bool], Outbox]
"""What a turn told, given whether it is on the disk."""

Check = Callable[[SessionState], None]

LEASE_SECONDS = 60.0
"""After this long without `tend` another process of a shared store may take a turn for dead; that
it was not is then told by the fence. In a folder of one's own the lock proves it sooner."""

MAX_EXPIRED_AT_ONCE = 100


def nothing_told(_is_durable: bool) -> Outbox:
    """Of a turn whose events nobody will ask for."""
    return Outbox()


class Sessions(SessionViews):
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
        super().__init__(store, Holdings(store, codec, memory_bytes, is_durable=is_durable))
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

    def _park(self, record: Record, state: SessionState) -> Session:
        self._holdings.park(record, state)
        return self._holdings.told(record)

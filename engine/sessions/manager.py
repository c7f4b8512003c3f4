"""`SessionManager`: everything that an owner can do with sessions, and what is undone on failure.

Open, import, look up, list, export and delete sessions; begin, commit and abandon turns; fork and
rewind. A turn takes two transactions of the store: `begin` leases the session and reads it,
`commit` stores the new state with its events and releases the lease.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import TypeVar, cast

from cottention.engine.errors import (
    SessionError,
    SessionMovedError,
    SessionNotFoundError,
    SnapshotError,
    StoreFullError,
    StoreUnavailableError,
    StoreUnreachableError,
)
from cottention.engine.sessions.snapshot import SnapshotCodec
from cottention.engine.sessions.state_cache import StateCache, UnsavedState
from cottention.engine.sessions.store import Lease, NewSession, SessionRecord, SessionStore
from cottention.engine.sessions.store.journal import SessionJournal
from cottention.engine.sessions.store.protocol import Answer, Claim, Claimed, KeyLedger
from cottention.engine.sessions.types import (
    AdoptedTurn,
    BytesReader,
    Exported,
    OpenExport,
    Session,
    SessionAnswer,
    SessionCounts,
    SessionValue,
    Turn,
)
from cottention.engine.state.context_window import ContextPolicy
from cottention.engine.state.event_log import NO_EVENTS, EventLog
from cottention.engine.state.session_state import SessionState

__all__ = ["LEASE_SECONDS", "Session", "SessionCounts", "SessionManager", "Turn", "save_all"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
Metadata = Mapping[str, str]
Check = Callable[[SessionState], None]

LEASE_SECONDS = 60.0
"""A lease that `maintain` has not renewed for so long may be taken over by another process that
shares the store. The fence then refuses the old turn's commit. Where a folder belongs to one
process, its lock ends the leases of a dead process at the next start."""

MAX_EXPIRED_AT_ONCE = 100
MAX_NAMED = 5
"""Sessions that a log line names."""


class SessionManager:
    """The sessions of a store, as their owners may see and change them.

    Thread-safe; calls wait for the disk. SessionNotFoundError is raised for another owner's
    session as for an unknown one. memory_bytes: budget for values kept in memory between turns.
    max_checkpoints: turns that can be rewound. ttl_seconds: lifetime of sessions that are created
    without one; None: unlimited. is_durable: whether the store survives a restart.
    """

    def __init__(
        self,
        store: SessionStore,
        codec: SnapshotCodec,
        *,
        memory_bytes: int,
        max_checkpoints: int,
        is_durable: bool,
        ttl_seconds: float | None = None,
        journal: SessionJournal | None = None,
    ) -> None:
        """journal: of turns that go on without their client; None where no other server could."""
        self._store = store
        self.journal = journal
        self._ttl_seconds = ttl_seconds
        self._codec = codec
        self._cache = StateCache(store, codec, memory_bytes)
        self._max_checkpoints = max_checkpoints
        self._is_durable = is_durable

    # Sessions

    def open(
        self,
        owner: str,
        state: SessionState,
        metadata: Metadata,
        ttl_seconds: float | None,
        *,
        session_id: str | None = None,
        events: EventLog = NO_EVENTS,
        answer: SessionAnswer | None = None,
    ) -> Session:
        """A new session with this state, and the events with which it came. StoreUnavailableError.

        session_id: its id, which no other session may have; None: a new one. answer: stored with
        it.
        """
        value = SessionValue(state, events)
        raw = self._codec.encode(state)
        return self._create(owner, raw, value, metadata, ttl_seconds, session_id, answer)

    def snapshot(self, state: SessionState) -> bytes:
        """The snapshot of a state that is no session. NonFiniteStateError, StateTooLargeError."""
        return self._codec.encode(state)

    def read_snapshot(self, raw: bytes, check: Check) -> SessionState:
        """The state of a snapshot, without storing it. SnapshotError.

        check: raises an error of its choice for a state that cannot be used here.
        """
        state = self._codec.decode(raw)
        check(state)
        return state

    @property
    def max_snapshot_nbytes(self) -> int:
        """Bytes of the largest snapshot that a session of this model can have."""
        return self._codec.max_nbytes

    def import_(
        self, owner: str, raw: bytes, metadata: Metadata, ttl_seconds: float | None, check: Check
    ) -> Session:
        """A new session from a snapshot. SnapshotError, before anything is stored;
        StoreUnavailableError.

        check: as in `read_snapshot`.
        """
        state = self.read_snapshot(raw, check)
        if self._codec.writes_recipes:  # rows from elsewhere are not always those of this machine
            return self.open(owner, self._codec.stored_form(state), metadata, ttl_seconds)
        return self._create(owner, raw, SessionValue(state), metadata, ttl_seconds)

    def find(self, owner: str, session_id: str) -> Session:
        """A session as it is now."""
        return self._describe(self._record(owner, session_id))

    def page(self, owner: str, after: str | None, limit: int) -> tuple[list[Session], bool]:
        """The owner's sessions after `after`, newest first; whether there are more."""
        records, has_more = self._store.list(owner, after, limit)
        return [self._describe(record) for record in records], has_more

    def export(self, owner: str, session_id: str) -> Exported:
        """A session after its last turn, and its snapshot. SnapshotError: it is damaged."""
        session, snapshot = self.open_export(owner, session_id)
        with closing(snapshot):
            return Exported(session, snapshot.read(0, snapshot.nbytes))

    def open_export(self, owner: str, session_id: str) -> OpenExport:
        """As `export`, with the snapshot to be read in pieces.

        A snapshot that is stored is never in memory as a whole.
        """

        def read(record: SessionRecord) -> OpenExport:
            unsaved = self._cache.unsaved(record.id)
            snapshot = (
                self._store.open_blob(record.head, 0, record.snapshot_nbytes)
                if unsaved is None
                else BytesReader(self._codec.encode(unsaved.value.state))
            )
            return OpenExport(self._session(record, unsaved), snapshot)

        return self._read_head(owner, session_id, read)

    def events(self, owner: str, session_id: str) -> EventLog:
        """The events that were committed with the last turn. SnapshotError: they are damaged."""
        return self._read_head(owner, session_id, self._cache.load_events)

    def value(self, owner: str, session_id: str) -> SessionValue:
        """A session's state and events, as they are between turns. SnapshotError: damaged.

        For sessions that no turn changes; what was read stays in memory within the budget.
        """
        return self._read_head(owner, session_id, self._cache.load_for_turn)

    def recent_ids(self, owner: str, session_id: str) -> tuple[Session, tuple[int, ...]]:
        """The session, and the ids that it keeps of its end: as many as one context window holds.

        SnapshotError: they are damaged.
        """

        def read(record: SessionRecord) -> tuple[Session, tuple[int, ...]]:
            unsaved = self._cache.unsaved(record.id)
            return self._session(record, unsaved), self._cache.load(record).state.recent

        return self._read_head(owner, session_id, read)

    def delete(self, owner: str, session_id: str) -> None:
        """SessionBusyError while a turn runs."""
        self._record(owner, session_id)
        self._store.delete(session_id)
        self._cache.remove(session_id)

    @property
    def key_ledger(self) -> KeyLedger | None:
        """Of the servers that share the store; None where there are no others."""
        return self._store.key_ledger

    def sizes(self) -> SessionCounts:
        """Numbers of sessions by residence, and their bytes."""
        return self._cache.counts()

    # Turns

    def begin(self, owner: str, session_id: str, expected_position: int | None = None) -> Turn:
        """Begin a turn, which ends by commit or abandon.

        SessionBusyError: another turn runs. SessionMovedError: the session is not at
        `expected_position`. StoreUnavailableError: the session cannot be leased or read.
        """
        lease, record = self._cache.begin(owner, session_id, LEASE_SECONDS)
        try:
            session = self._at(expected_position, record)
            with _reading(session_id):
                state = self._cache.load_for_turn(record).state
            return Turn(session, state, lease, record)
        except BaseException:
            self._cache.release(lease)
            raise

    def preview(self, turn: Turn, state: SessionState) -> Session:
        """The session after `turn` if it is committed with `state` and stored.

        Its version, bytes and checkpoints are still those of before the turn.
        """
        return replace(
            turn.session,
            position=state.num_tokens,
            context_policy=state.context_policy,
            context_start=self._context_start(state.context_policy, state.num_tokens),
            is_durable=self._is_durable,
            was_interrupted=False,
        )

    def commit(
        self,
        turn: Turn,
        state: SessionState,
        events: EventLog = NO_EVENTS,
        unsaved_events: EventLog | None = None,
        answer: SessionAnswer | None = None,
        *,
        max_checkpoints: int | None = None,
    ) -> Session:
        """Make `state` the session's state, stored when this returns, and end the turn.

        A store that other servers share has it, or StoreUnavailableError is raised: then the
        session is as before, unless the connection broke while the store took it. A turn that is
        journaled has not ended where the store cannot be reached: `leave` it.

        events: kept until the next turn's take their place. unsaved_events: kept instead where
        another store does not take it; None: the same. Then state and events stay in memory, and
        the session is not durable until a later turn is stored. SessionMovedError: the lease was
        taken over. answer: stored with the state, and only then. max_checkpoints: turns that can be
        rewound after it, unless given those of all sessions.
        """
        most = self._max_checkpoints if max_checkpoints is None else max_checkpoints
        value = SessionValue(state, events)
        try:
            kept = self._answer(answer)
            record = self._cache.commit(turn.lease, value, most, kept)
        except StoreUnavailableError as error:
            if self._store.is_shared:
                is_away = isinstance(error, StoreUnreachableError)
                if self.journal is None or not (is_away and self.journal.has(turn.lease)):
                    self._cache.release(turn.lease)
                raise
            log = events if unsaved_events is None else unsaved_events
            record = self._keep_unsaved(turn, SessionValue(state, log))
        except BaseException:
            self._cache.release(turn.lease)
            raise
        return self._describe(record)

    def abandon(self, turn: Turn) -> None:
        """End a turn and leave the session as it was; nothing happens where it has ended."""
        self._cache.release(turn.lease)

    def fork(
        self,
        owner: str,
        session_id: str,
        n: int,
        expected_position: int | None = None,
        metadata: Metadata | None = None,
        answer: SessionAnswer | None = None,
    ) -> list[Session]:
        """n new sessions with the state and the checkpoints of this one.

        metadata: theirs; None: that of this session. answer: stored with them.
        """
        with self._leased(owner, session_id, expected_position) as (_, record):
            with _reading(session_id):
                value = self._cache.load_for_turn(record)
            new = self._fork_of(record, value)
            if metadata is not None:
                new = replace(new, metadata=metadata)
            forks = self._store.create([new] * n, self._answer(answer))
            return [self._park(fork, value) for fork in forks]

    def rewind(self, owner: str, session_id: str, expected_position: int | None = None) -> Session:
        """Undo the last turn. NothingToRewindError; SessionMovedError as in `begin`.

        Of the turns that could not be stored only the first can be undone, and only while it is
        the last: the states between it and the newest are not kept.
        """
        with self._leased(owner, session_id, expected_position) as (lease, record):
            if not self._cache.rewind_unsaved(session_id):
                record = self._store.rewind(lease, lease.version)
                self._cache.forget(session_id)
        return self._describe(record)

    # Turns that go on without their client

    def now(self) -> float:
        """The store's time."""
        return self._store.now()

    def adopt(self, session_id: str) -> AdoptedTurn | None:
        """Go on with a turn whose server has died, or handed it over; None where none waits.

        It ends as one that was begun here. SessionError, SnapshotError: then others may try.
        """
        journal = self.journal
        assert journal is not None
        adopted = journal.adopt(session_id, LEASE_SECONDS)
        if adopted is None:
            return None
        self._cache.take(adopted.lease)
        try:
            state = self._cache.load_for_turn(adopted.record).state
        except BaseException:
            self._cache.leave(adopted.lease)
            journal.hand_over(adopted.lease, has_failed=True)
            raise
        turn = Turn(self._describe(adopted.record), state, adopted.lease, adopted.record)
        return AdoptedTurn(turn, adopted.turn, adopted.ids, adopted.events)

    def leave(self, turn: Turn, *, hands_over: bool) -> None:
        """End a turn here that another server goes on with; hands_over: or shall go on with."""
        self._cache.leave(turn.lease)
        if hands_over and self.journal is not None:
            self.journal.hand_over(turn.lease)

    # Idempotency keys

    def claim(self, owner: str, key: str, request: bytes, seconds: float) -> Claim | Claimed:
        """As SessionStore.claim. StoreUnavailableError."""
        return self._store.claim(owner, key, request, seconds)

    def keep_answer(self, claim: Claim, answer: bytes) -> None:
        """As SessionStore.keep_answer. StoreUnavailableError."""
        self._store.keep_answer(claim, answer)

    def drop_claim(self, claim: Claim) -> None:
        """As SessionStore.drop_claim. StoreUnavailableError."""
        self._store.drop_claim(claim)

    # Maintenance

    def check_reachable(self) -> None:
        """Raise StoreUnreachableError where the store cannot be reached. Does not wait."""
        self._store.check_reachable()

    def maintain(self) -> bool:
        """Renew the leases of running turns, delete some sessions that have expired, and give some
        of the space that is free again back to the disk.

        To be called more often than every LEASE_SECONDS. Returns whether there may be more.
        """
        for lease in self._cache.running():
            with suppress(SessionError):  # the turn has just ended, or its commit will report it
                self._store.renew(lease, LEASE_SECONDS)
        self._cache.retry_releases()
        expired = self._store.expire(MAX_EXPIRED_AT_ONCE)
        for session_id in expired:
            self._cache.remove(session_id)
        return self._store.give_back() or len(expired) == MAX_EXPIRED_AT_ONCE

    def close(self) -> None:
        """Abandon running turns, try once more to store unsaved states, and close the store."""
        try:
            for lease in self._cache.running():
                with suppress(SessionError):  # the next start ends the lease
                    self._cache.release(lease)
            if self._is_durable:  # otherwise the folder ends with the server
                self._save_unsaved()
        finally:
            self._store.close()

    # Private

    def _answer(self, answer: SessionAnswer | None) -> Answer | None:
        """The same for the store; it is made while a session still belongs to its turn."""
        if answer is None:
            return None

        def make(records: Sequence[SessionRecord]) -> bytes:
            sessions = [self._session(record, None) for record in records]
            return answer.make([replace(each, residence="parked") for each in sessions])

        return Answer(answer.claim, make)

    def _create(
        self,
        owner: str,
        raw: bytes,
        value: SessionValue,
        metadata: Metadata,
        ttl: float | None,
        session_id: str | None = None,
        answer: SessionAnswer | None = None,
    ) -> Session:
        ttl = self._ttl_seconds if ttl is None else ttl
        new = NewSession(
            owner,
            value.state.num_tokens,
            snapshot=raw,
            metadata=metadata,
            expires_at=None if ttl is None else self._store.now() + ttl,
            context_policy=value.state.context_policy,
            events=value.events.to_bytes(),
            id=session_id,
        )
        [record] = self._store.create([new], self._answer(answer))
        return self._park(record, value)

    def _fork_of(self, record: SessionRecord, value: SessionValue) -> NewSession:
        unsaved = self._cache.unsaved(record.id)
        new = NewSession(
            record.owner,
            value.state.num_tokens,
            head=record.head,
            checkpoints=record.checkpoints,
            metadata=record.metadata,
            expires_at=record.expires_at,
            context_policy=value.state.context_policy,
        )
        if unsaved is None:
            return new
        return replace(
            new,
            snapshot=self._codec.encode(value.state),
            events=value.events.to_bytes(),
            head=None,
            checkpoints=unsaved.checkpoints(record),
        )

    def _keep_unsaved(self, turn: Turn, value: SessionValue) -> SessionRecord:
        try:
            self._cache.keep_unsaved(turn.lease, value)
            return self._record(turn.session.owner, turn.session.id)
        except StoreUnavailableError:  # the index cannot be read either
            return turn.record
        finally:
            self._cache.release(turn.lease)

    def _save_unsaved(self) -> None:
        unsaved = self._cache.all_unsaved()
        if not unsaved:
            return
        with suppress(Exception):  # without it there is as much room as before
            self._store.free_reserve()

        def save(session_id: str, _: UnsavedState) -> None:
            self._cache.save_unsaved(session_id, LEASE_SECONDS, self._max_checkpoints)

        save_all(unsaved, save)

    def _read_head(self, owner: str, session_id: str, read: Callable[[SessionRecord], T]) -> T:
        """What `read` finds of the head; where a turn replaces that meanwhile, of the next one."""
        record = self._record(owner, session_id)
        try:
            with _reading(session_id):
                return read(record)
        except SnapshotError:
            if self._store.head(session_id) == record.version:
                raise
        return self._read_head(owner, session_id, read)

    def _record(self, owner: str, session_id: str) -> SessionRecord:
        try:
            record = self._store.record(session_id)
        except SessionNotFoundError:  # it may have expired while its value is in memory
            self._cache.forget(session_id)
            raise
        if record.owner != owner:
            raise SessionNotFoundError(f"no session {session_id!r}")
        return record

    @contextmanager
    def _leased(
        self, owner: str, session_id: str, expected_position: int | None
    ) -> Iterator[tuple[Lease, SessionRecord]]:
        lease, record = self._cache.begin(owner, session_id, LEASE_SECONDS)
        try:
            self._at(expected_position, record)
            yield lease, record
        finally:
            self._cache.release(lease)

    def _at(self, expected_position: int | None, record: SessionRecord) -> Session:
        """The session; SessionMovedError where it is not at this position. None: at any."""
        session = self._describe(record)
        if expected_position not in (None, session.position):
            where = f"session {record.id!r} is at position {session.position}"
            raise SessionMovedError(f"{where}, not at {expected_position}")
        return session

    def _park(self, record: SessionRecord, value: SessionValue) -> Session:
        self._cache.park(record, value)
        return self._describe(record)

    def _describe(self, record: SessionRecord) -> Session:
        return self._session(record, self._cache.unsaved(record.id))

    def _session(self, record: SessionRecord, unsaved: UnsavedState | None) -> Session:
        """A record, and what only memory knows of its session."""
        position, policy = record.position, cast("ContextPolicy", record.context_policy)
        checkpoints = record.checkpoints
        if unsaved is not None:
            state = unsaved.value.state
            position, policy = state.num_tokens, state.context_policy
            checkpoints = unsaved.checkpoints(record)
        return Session(
            id=record.id,
            owner=record.owner,
            created=record.created,
            version=record.version,
            position=position,
            nbytes=record.nbytes,
            residence=self._cache.residence(record.id),
            metadata=record.metadata,
            expires_at=self._unix_time(record.expires_at),
            num_checkpoints=len(checkpoints),
            is_durable=self._is_durable and unsaved is None,
            was_interrupted=record.was_interrupted and unsaved is None,
            context_policy=policy,
            context_start=self._context_start(policy, position),
        )

    def _unix_time(self, moment: float | None) -> float | None:
        return None if moment is None else self._store.unix_time(moment)

    def _context_start(self, policy: ContextPolicy, position: int) -> int:
        return self._codec.context_schedules[policy].start(max(position - 1, 0))


@contextmanager
def _reading(session_id: str) -> Iterator[None]:
    """Give a SnapshotError the session whose stored bytes raise it."""
    try:
        yield
    except SnapshotError as error:
        error.session_id = session_id
        raise


def save_all(unsaved: Mapping[str, T], save: Callable[[str, T], object]) -> None:
    """Call `save` for each value and its session id, and log which of them raised an error."""
    lost: dict[str, Exception] = {}
    for session_id, value in unsaved.items():
        try:
            save(session_id, value)
        except SessionNotFoundError:  # it has expired
            continue
        except Exception as error:
            lost[session_id] = error
    if lost:
        _log_lost(lost)


def _log_lost(lost: Mapping[str, Exception]) -> None:
    named, num_others = ", ".join([*lost][:MAX_NAMED]), len(lost) - MAX_NAMED
    reason = next(iter(lost.values()))
    is_full = isinstance(reason, StoreFullError)
    advice = "make room on the disk" if is_full else "let the session folder take writes"
    logger.error(
        "the last turns of %d session(s) are lost, since they could not be stored: %s (%s); each is"
        " as it was before them: %s before the next start, then repeat them",
        len(lost),
        named if num_others <= 0 else f"{named} and {num_others} more",
        " ".join(str(reason).split()) or type(reason).__name__,
        advice,
    )

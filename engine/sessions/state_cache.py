"""A cache of session values in front of the store: running turns, unsaved and parked values.

The store has every value except those that it did not take (`UnsavedStates`); memory also has
the most recently used ones (`ParkedStates`), within a budget.
"""

import logging
import threading
from collections import OrderedDict
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple

from cottention.engine.errors import NothingToRewindError, SessionMovedError, StoreUnavailableError
from cottention.engine.sessions.memory_usage import (
    COUNT_BYTES,
    EVENT_BYTES,
    ID_BYTES,
    VALUE_BYTES,
)
from cottention.engine.sessions.snapshot import SnapshotCodec
from cottention.engine.sessions.store import Lease, SessionRecord, SessionStore
from cottention.engine.sessions.store.protocol import Answer
from cottention.engine.sessions.types import Residence, SessionCounts, SessionValue
from cottention.engine.state.event_log import EventLog

logger = logging.getLogger(__name__)


class UnsavedState(NamedTuple):
    """A session's value after `num_turns` more turns than the store has."""

    value: SessionValue
    num_turns: int

    def checkpoints(self, record: SessionRecord) -> tuple[str, ...]:
        """Digests of the states that it can be rewound to, the newest last."""
        return (*record.checkpoints, record.head) if self.num_turns == 1 else ()


class UnsavedStates:
    """The newest value of each session that the store did not take. Not thread-safe.

    Only the newest is kept, so a session can be rewound only where it is one turn ahead.
    """

    def __init__(self) -> None:
        self._found: dict[str, UnsavedState] = {}

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._found

    def __len__(self) -> int:
        return len(self._found)

    @property
    def num_bytes(self) -> int:
        """Bytes of all."""
        return sum(_num_bytes(unsaved.value) for unsaved in self._found.values())

    def get(self, session_id: str) -> UnsavedState | None:
        """The session's value; None where the store has it."""
        return self._found.get(session_id)

    def all(self) -> dict[str, UnsavedState]:
        """The values of all sessions, by id."""
        return dict(self._found)

    def add_turn(self, session_id: str, value: SessionValue) -> None:
        """Replace the session's value by the one after one more turn."""
        before = self._found.get(session_id)
        self._found[session_id] = UnsavedState(value, 1 + (before.num_turns if before else 0))

    def rewind(self, session_id: str) -> bool:
        """Return to the value in the store; whether there was an unsaved one.

        NothingToRewindError: the one in the store is more than a turn older.
        """
        unsaved = self._found.get(session_id)
        if unsaved is not None and unsaved.num_turns > 1:
            raise NothingToRewindError(
                "the session as it was before its last turn is not kept, since the disk was full or"
                " the session folder took no writes"
            )
        return self.remove(session_id)

    def remove(self, session_id: str) -> bool:
        """Remove a session that is stored or deleted; whether there was a value."""
        return self._found.pop(session_id, None) is not None


@dataclass(slots=True)
class _Entry:
    """A value, its bytes, and the sessions that have it."""

    value: SessionValue
    nbytes: int
    session_ids: set[str] = field(default_factory=set)


class ParkedStates:
    """At most `max_bytes` of values by digest, least recently used first out. Not thread-safe.

    Forks share one entry. `num_bytes`: of all entries.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._digests: dict[str, str] = {}  # by session id
        self.num_bytes = 0

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._digests

    def __len__(self) -> int:
        """Number of sessions."""
        return len(self._digests)

    def get(self, digest: str) -> SessionValue | None:
        """The value if it is here; it becomes the most recently used."""
        entry = self._entries.get(digest)
        if entry is None:
            return None
        self._entries.move_to_end(digest)
        return entry.value

    def add(self, session_id: str, digest: str, value: SessionValue) -> None:
        """Make this the session's value; its older one is removed unless another session has it."""
        self.remove(session_id)
        entry = self._entries.get(digest)
        if entry is None:
            entry = self._entries[digest] = _Entry(value, _num_bytes(value))
            self.num_bytes += entry.nbytes
        self._entries.move_to_end(digest)
        entry.session_ids.add(session_id)
        self._digests[session_id] = digest
        while self.num_bytes > self._max_bytes:
            self._evict(next(iter(self._entries)))

    def remove(self, session_id: str) -> None:
        """Remove a session; nothing happens where it is not here."""
        digest = self._digests.pop(session_id, None)
        if digest is None:
            return
        session_ids = self._entries[digest].session_ids
        session_ids.discard(session_id)
        if not session_ids:
            self._evict(digest)

    def _evict(self, digest: str) -> None:
        entry = self._entries.pop(digest)
        self.num_bytes -= entry.nbytes
        for session_id in entry.session_ids:
            del self._digests[session_id]


def _num_bytes(value: SessionValue) -> int:
    """Bytes that a value takes in memory: of everything in it, and of the objects themselves."""
    state, events = value
    num_ids = len(state.pending) + len(state.recent)
    lists = num_ids * ID_BYTES + len(state.counts) * COUNT_BYTES + len(state.undecoded)
    log = events.nbytes + len(events.events) * EVENT_BYTES
    return VALUE_BYTES + state.nbytes + lists + log


class StateCache:
    """Values by session, wherever they are, and the leases of running turns. Thread-safe.

    Its lock guards what is in memory and is never held during a call of the store.
    """

    def __init__(self, store: SessionStore, codec: SnapshotCodec, memory_bytes: int) -> None:
        self._store = store
        self._codec = codec
        self._lock = threading.Lock()
        self._parked = ParkedStates(memory_bytes)
        self._unsaved = UnsavedStates()
        self._running: dict[str, Lease] = {}
        self._unreleased: dict[str, Lease] = {}

    def begin(self, owner: str, session_id: str, seconds: float) -> tuple[Lease, SessionRecord]:
        """Lease an owner's session for a turn. SessionNotFoundError; SessionBusyError.

        StoreUnavailableError: the session cannot be leased, or the last turn's lease could not be
        released, and still cannot.
        """
        self._retry_release(session_id)
        lease, record = self._store.acquire(session_id, seconds, owner)
        with self._lock:
            self._running[session_id] = lease
        return lease, record

    def take(self, lease: Lease) -> None:
        """Note a turn that goes on under this lease, which the store has given already."""
        with self._lock:
            self._running[lease.session_id] = lease

    def leave(self, lease: Lease) -> None:
        """The opposite of `take`, for a turn that others go on with. Idempotent."""
        with self._lock:
            self._end(lease)

    def release(self, lease: Lease) -> None:
        """End a turn without a new value; nothing happens where it has ended.

        Where the store does not take the release, the next turn repeats it first; otherwise the
        lease runs out.
        """
        try:
            self._store.release(lease)
        except StoreUnavailableError as error:
            logger.debug("session %s stays leased for now: %s", lease.session_id, error)
            with self._lock:
                self._unreleased[lease.session_id] = lease
        finally:
            with self._lock:
                self._end(lease)

    def running(self) -> list[Lease]:
        """The leases of the running turns."""
        with self._lock:
            return [*self._running.values()]

    def retry_releases(self) -> None:
        """End the leases that the store has not released: another server may want them.

        StoreUnavailableError: it still does not.
        """
        with self._lock:
            session_ids = [*self._unreleased]
        for session_id in session_ids:
            self._retry_release(session_id)

    def load(self, record: SessionRecord) -> SessionValue:
        """A session's value, from wherever it is. SnapshotError: damaged, or no longer stored."""
        return self._in_memory(record) or self._decode(record)

    def load_events(self, record: SessionRecord) -> EventLog:
        """The events of `load`; of what is on the disk nothing else is read into memory."""
        value = self._in_memory(record)
        if value is not None:
            return value.events
        start = record.snapshot_nbytes
        with closing(self._store.open_blob(record.head, start, record.nbytes)) as log:
            return EventLog.from_bytes(log.read(0, log.nbytes))

    def load_for_turn(self, record: SessionRecord) -> SessionValue:
        """As `load`, for a turn that has the lease: a value from the disk is parked."""
        value = self.load(record)
        with self._lock:
            if record.id not in self._unsaved:
                self._parked.add(record.id, record.head, value)
        return value

    def commit(
        self, lease: Lease, value: SessionValue, max_checkpoints: int, answer: Answer | None = None
    ) -> SessionRecord:
        """Store a turn's value, and its answer, and release its lease, in one transaction.

        The unsaved value of an earlier turn is stored before it. StoreUnavailableError: not
        everything is stored, and the lease is held. SessionMovedError.
        """
        version = lease.version
        if (unsaved := self.unsaved(lease.session_id)) is not None:
            stored = self._stored(unsaved, max_checkpoints)
            before = self._store.commit(lease, version, *stored, keeps_lease=True)
            version = before.version
            self.park(before, unsaved.value)
        new = UnsavedState(value, 1)
        stored = self._stored(new, max_checkpoints)
        record = self._store.commit(lease, version, *stored, answer=answer)
        with self._lock:
            # the session is free: where another turn has begun, the value may be an old one
            if self._end(lease):
                self._parked.add(record.id, record.head, value)
        return record

    def keep_unsaved(self, lease: Lease, value: SessionValue) -> None:
        """Keep a turn's value in memory, whatever the budget: the store did not take it.

        SessionMovedError: the turn has ended. The store may not have compared the fence.
        """
        with self._lock:
            if self._running.get(lease.session_id) != lease:
                raise SessionMovedError(f"session {lease.session_id!r} is not held by this turn")
            self._parked.remove(lease.session_id)
            self._unsaved.add_turn(lease.session_id, value)
        logger.debug("the last turn of session %s is in memory alone for now", lease.session_id)

    def save_unsaved(self, session_id: str, seconds: float, max_checkpoints: int) -> None:
        """Store a session's unsaved value. Raises what the store raises."""
        unsaved = self.unsaved(session_id)
        assert unsaved is not None
        self._retry_release(session_id)
        lease, _ = self._store.acquire(session_id, seconds)
        new = self._stored(unsaved, max_checkpoints)
        record = self._store.commit(lease, lease.version, *new)
        self.park(record, unsaved.value)

    def park(self, record: SessionRecord, value: SessionValue) -> None:
        """Keep a value that is stored in memory as well, within the budget."""
        with self._lock:
            self._unsaved.remove(record.id)
            self._parked.add(record.id, record.head, value)

    def rewind_unsaved(self, session_id: str) -> bool:
        """Return to the value in the store; whether there was an unsaved one.

        NothingToRewindError: the one in the store is more than a turn older.
        """
        with self._lock:
            return self._unsaved.rewind(session_id)

    def unsaved(self, session_id: str) -> UnsavedState | None:
        """The session's unsaved value, if there is one."""
        with self._lock:
            return self._unsaved.get(session_id)

    def all_unsaved(self) -> dict[str, UnsavedState]:
        """All unsaved values, by session id."""
        with self._lock:
            return self._unsaved.all()

    def forget(self, session_id: str) -> None:
        """Remove a session's values from memory: they are not those of the store."""
        with self._lock:
            self._forget(session_id)

    def remove(self, session_id: str) -> None:
        """Remove a session that was deleted, with the lease of a turn that has just ended."""
        with self._lock:
            self._forget(session_id)
            self._running.pop(session_id, None)

    def residence(self, session_id: str) -> Residence:
        """Where the session is."""
        with self._lock:
            if session_id in self._running:
                return "resident"
            return "parked" if self._is_in_memory(session_id) else "stored"

    def counts(self) -> SessionCounts:
        """Numbers of sessions by residence, and their bytes."""
        stored = self._store.counts()
        with self._lock:
            num_running, num_unsaved = len(self._running), len(self._unsaved)
            num_in_memory = len(self._parked) + num_unsaved
            num_parked = num_in_memory - sum(map(self._is_in_memory, self._running))
            num_bytes = self._parked.num_bytes + self._unsaved.num_bytes
        num_stored = max(0, stored.num_sessions - num_running - num_parked)
        return SessionCounts(
            num_running, num_parked, num_stored, num_bytes, stored.blob_bytes, num_unsaved
        )

    def _in_memory(self, record: SessionRecord) -> SessionValue | None:
        with self._lock:
            unsaved = self._unsaved.get(record.id)
            return unsaved.value if unsaved else self._parked.get(record.head)

    def _decode(self, record: SessionRecord) -> SessionValue:
        snapshot, events = record.split(self._store.get(record.head))
        return SessionValue(self._codec.decode(snapshot), EventLog.from_bytes(events))

    def _stored(
        self, unsaved: UnsavedState, max_checkpoints: int
    ) -> tuple[bytes, int, int, str, bytes]:
        """A value as `SessionStore.commit` takes it."""
        (state, events), num_turns = unsaved
        return (
            self._codec.encode(state),
            state.num_tokens,
            max_checkpoints if num_turns == 1 else 0,
            state.context_policy,
            events.to_bytes(),
        )

    def _retry_release(self, session_id: str) -> None:
        with self._lock:
            lease = self._unreleased.get(session_id)
        if lease is not None:
            self._store.release(lease)
            with self._lock:
                if self._unreleased.get(session_id) == lease:
                    del self._unreleased[session_id]

    def _end(self, lease: Lease) -> bool:
        """Whether it was a running turn's."""
        if self._running.get(lease.session_id) != lease:
            return False
        del self._running[lease.session_id]
        return True

    def _forget(self, session_id: str) -> None:
        self._unsaved.remove(session_id)
        self._unreleased.pop(session_id, None)
        self._parked.remove(session_id)

    def _is_in_memory(self, session_id: str) -> bool:
        return session_id in self._unsaved or session_id in self._parked

"""Sessions without a disk, in a dictionary: what the server uses of a `SessionManager`.

tests/contract shows that it behaves alike. Its leases can be inspected, and its calls can be made
to fail.
"""

import itertools
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

from cottention.engine.errors import (
    NothingToRewindError,
    SessionBusyError,
    SessionMovedError,
    SessionNotFoundError,
    SnapshotError,
    SnapshotMismatchError,
    StoreFullError,
    StoreUnavailableError,
)
from cottention.engine.sessions.types import BytesReader, OpenExport, Session, SessionValue
from cottention.engine.state.context_window import context_schedules
from cottention.engine.state.event_log import NO_EVENTS, EventLog
from cottention.engine.state.session_state import SessionState


@dataclass(frozen=True)
class FakeSession:
    id: str
    owner: str
    created: int
    version: int
    position: int
    metadata: Mapping[str, str]
    expires_at: float | None
    states: tuple[SessionState, ...]
    logs: tuple[EventLog, ...] = (NO_EVENTS,)
    nbytes: int = 100
    residence: str = "parked"
    is_durable: bool = True
    was_interrupted: bool = False

    @property
    def context_policy(self) -> str:
        return self.states[-1].context_policy

    @property
    def context_start(self) -> int:
        return context_schedules(512)[self.states[-1].context_policy].start(
            max(self.position - 1, 0)
        )

    @property
    def num_checkpoints(self) -> int:
        return len(self.states) - 1


@dataclass(eq=False)
class FakeTurn:
    session: FakeSession
    state: SessionState


def is_over(session: FakeSession) -> bool:
    """Whether its time to live is over."""
    return session.expires_at is not None and session.expires_at < time.time()


@dataclass
class FakeSessions:
    """fails: errors that the next calls of these names raise."""

    fails: dict[str, Exception] = field(default_factory=dict)
    is_full: bool = False
    max_snapshot_nbytes: int = 1 << 20
    key_ledger: Any = None
    journal: None = None

    def __post_init__(self) -> None:
        self.kept: dict[str, FakeSession] = {}
        self.leased: dict[str, FakeTurn] = {}
        self.ends: list[str] = []
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def state_of(self, session_id: str) -> SessionState:
        return self.kept[session_id].states[-1]

    def open(
        self,
        owner: str,
        state: SessionState,
        metadata: Any,
        ttl_seconds: float | None,
        *,
        session_id: str | None = None,
        events: EventLog = NO_EVENTS,
        answer: None = None,  # noqa: ARG002
    ) -> FakeSession:
        self._may_fail("open")
        expires = None if ttl_seconds is None else time.time() + ttl_seconds
        name = session_id or f"s{next(self._numbers)}"
        num, states, logs = state.num_tokens, (state,), (events,)
        made = FakeSession(name, owner, 1, 1, num, metadata, expires, states, logs)
        self.kept[name] = made
        return made

    def find(self, owner: str, session_id: str) -> FakeSession:
        found = self.kept.get(session_id)
        if found is None or found.owner != owner or is_over(found):
            raise SessionNotFoundError(f"no session {session_id!r}")
        return replace(found, residence="resident") if session_id in self.leased else found

    def page(self, owner: str, after: str | None, limit: int) -> tuple[list[FakeSession], bool]:
        mine = [each for each in reversed(self.kept.values()) if each.owner == owner]
        mine = [each for each in mine if not is_over(each)]
        if after is not None:
            self.find(owner, after)
            mine = mine[[each.id for each in mine].index(after) + 1 :]
        return mine[:limit], len(mine) > limit

    def delete(self, owner: str, session_id: str) -> None:
        self._check_free(owner, session_id)
        del self.kept[session_id]

    def begin(self, owner: str, session_id: str, expected_position: int | None = None) -> FakeTurn:
        self._may_fail("begin")
        with self._lock:
            session = self._check_free(owner, session_id)
            self._check_position(session, expected_position)
            self.leased[session_id] = turn = FakeTurn(session, session.states[-1])
        return turn

    def preview(self, turn: FakeTurn, state: SessionState) -> FakeSession:
        states = (*turn.session.states, state)
        return replace(turn.session, states=states, position=state.num_tokens, is_durable=True)

    def commit(
        self,
        turn: FakeTurn,
        state: SessionState,
        events: EventLog = NO_EVENTS,
        unsaved_events: EventLog = NO_EVENTS,
        answer: None = None,  # noqa: ARG002
        *,
        max_checkpoints: int | None = None,
    ) -> FakeSession:
        self._may_fail("commit")
        if not self._runs(turn):
            raise SessionMovedError("the turn has ended")
        new = replace(
            self.preview(turn, state),
            logs=(*turn.session.logs, unsaved_events if self.is_full else events),
            version=turn.session.version + 1,
            is_durable=not self.is_full,
            residence="parked",
        )
        if max_checkpoints is not None:
            new = replace(new, states=new.states[-1 - max_checkpoints :])
        self.kept[new.id] = new
        self._release(turn, "commit")
        return new

    def abandon(self, turn: FakeTurn) -> None:
        if self._runs(turn):
            self._release(turn, "abandon")

    def fork(
        self,
        owner: str,
        session_id: str,
        n: int,
        expected_position: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> list[FakeSession]:
        session = self._check_free(owner, session_id)
        self._check_position(session, expected_position)
        kept = session.metadata if metadata is None else metadata
        made = [self.open(owner, session.states[-1], kept, None) for _ in range(n)]
        forks = [
            replace(each, states=session.states, expires_at=session.expires_at) for each in made
        ]
        self.kept |= {each.id: each for each in forks}
        return forks

    def rewind(
        self, owner: str, session_id: str, expected_position: int | None = None
    ) -> FakeSession:
        old = self._check_free(owner, session_id)
        self._check_position(old, expected_position)
        if len(old.states) == 1:
            raise NothingToRewindError("there is no earlier turn")
        states = old.states[:-1]
        position = states[-1].num_tokens
        new = replace(
            old, states=states, logs=old.logs[:-1], version=old.version + 1, position=position
        )
        self.kept[session_id] = new
        return new

    def events(self, owner: str, session_id: str) -> EventLog:
        return self.find(owner, session_id).logs[-1]

    def value(self, owner: str, session_id: str) -> SessionValue:
        found = self.find(owner, session_id)
        return SessionValue(found.states[-1], found.logs[-1])

    def recent_ids(self, owner: str, session_id: str) -> tuple[FakeSession, tuple[int, ...]]:
        found = self.find(owner, session_id)
        return found, found.states[-1].recent

    def export(self, owner: str, session_id: str) -> tuple[FakeSession, bytes]:
        found, snapshot = self.open_export(owner, session_id)
        return found, snapshot.read(0, snapshot.nbytes)

    def open_export(self, owner: str, session_id: str) -> OpenExport:
        found = self.find(owner, session_id)
        return OpenExport(cast(Session, found), BytesReader(self.snapshot(found.states[-1])))

    def import_(
        self, owner: str, raw: bytes, metadata: Any, ttl_seconds: float | None, check: Any
    ) -> FakeSession:
        return self.open(owner, self.read_snapshot(raw, check), metadata, ttl_seconds)

    def snapshot(self, state: SessionState) -> bytes:
        self._may_fail("snapshot")
        return b"fake:" + bytes(state.recent)

    def read_snapshot(self, raw: bytes, check: Any) -> SessionState:
        if raw.startswith(b"other:"):
            raise SnapshotMismatchError("weights differ: expected a, found b")
        if not raw.startswith(b"fake:"):
            raise SnapshotError("this is no snapshot")
        state = SessionState().extended(raw.removeprefix(b"fake:"), (), 512)
        check(state)
        return state

    def check_reachable(self) -> None:
        """A dictionary is always there."""

    def sizes(self) -> Any:
        num = len(self.leased)
        return SimpleNamespace(
            num_resident=num,
            num_parked=len(self.kept) - num,
            num_stored=0,
            parked_bytes=100 * len(self.kept),
            stored_bytes=7,
            num_unsaved=0,
        )

    def _check_free(self, owner: str, session_id: str) -> FakeSession:
        session = self.find(owner, session_id)
        if session_id in self.leased:
            raise SessionBusyError("another turn has this session")
        return session

    def _check_position(self, session: FakeSession, expected: int | None) -> None:
        if expected not in (None, session.position):
            raise SessionMovedError(f"it is at {session.position}, not at {expected}")

    def _release(self, turn: FakeTurn, how: str) -> None:
        del self.leased[turn.session.id]
        self.ends.append(how)

    def _runs(self, turn: FakeTurn) -> bool:
        return self.leased.get(turn.session.id) is turn

    def _may_fail(self, name: str) -> None:
        if error := self.fails.pop(name, None):
            raise error


FULL = StoreFullError("the disk is full")
READ_ONLY = StoreUnavailableError("the session folder does not take writes: read-only")

"""What the server relies on of sessions, asked of the real ones and of the fake alike.

States have no rows here, so that no model is needed.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cottention.engine.errors import (
    NothingToRewindError,
    SessionBusyError,
    SessionMovedError,
    SessionNotFoundError,
    SnapshotError,
)
from cottention.engine.sessions.fingerprint import Fingerprint
from cottention.engine.sessions.manager import SessionManager
from cottention.engine.sessions.snapshot import SnapshotCodec
from cottention.engine.sessions.store import SqliteStore
from cottention.engine.state.context_window import context_schedules
from cottention.engine.state.event_log import EventLog
from cottention.engine.state.session_state import SessionState
from cottention.engine.state.spec import StateSpec, recurrence_tensors
from tests.server.fake_sessions import FakeSessions
from tests.server.live import eventually

OWNER, STRANGER = "somebody", "somebody else"
WINDOW = 512


@pytest.fixture(params=["fake", "real"])
def sessions(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "fake":
        yield FakeSessions()
        return
    spec = StateSpec(recurrence_tensors(layers=1, heads=1, value_width=8, key_width=8))
    prints = Fingerprint("w", "t", "c", "l")
    made = SessionManager(
        SqliteStore(tmp_path),
        SnapshotCodec(prints, spec, 256, context_schedules(WINDOW), WINDOW),
        memory_bytes=1 << 20,
        max_checkpoints=8,
        is_durable=True,
    )
    with contextlib.closing(made):
        yield made


def holding(text: bytes) -> SessionState:
    return SessionState().extended(text, (), WINDOW)


def opened(sessions: Any, text: bytes = b"abc", owner: str = OWNER) -> str:
    session_id: str = sessions.open(owner, holding(text), {}, None).id
    return session_id


def commit(sessions: Any, turn: Any, state: SessionState) -> Any:
    return sessions.commit(turn, state)


def take_turn(sessions: Any, session_id: str, text: bytes = b"de") -> Any:
    """The session after a turn that added a text."""
    turn = sessions.begin(OWNER, session_id)
    return commit(sessions, turn, turn.state.extended(text, (), WINDOW))


def text_of(sessions: Any, session_id: str) -> bytes:
    """What a session holds, by a turn that comes to nothing."""
    turn = sessions.begin(OWNER, session_id)
    sessions.abandon(turn)
    return bytes(turn.state.recent)


def facts(session: Any) -> tuple[Any, ...]:
    """What of a session only its owner changes."""
    names = ("id", "owner", "created", "position", "metadata", "expires_at", "num_checkpoints")
    return tuple(getattr(session, name) for name in (*names, "version", "context_policy"))


VERBS: dict[str, Callable[[Any, str, str], Any]] = {
    "find": lambda sessions, owner, name: sessions.find(owner, name),
    "begin": lambda sessions, owner, name: sessions.begin(owner, name),
    "fork": lambda sessions, owner, name: sessions.fork(owner, name, 1),
    "recent_ids": lambda sessions, owner, name: sessions.recent_ids(owner, name),
    "rewind": lambda sessions, owner, name: sessions.rewind(owner, name),
    "delete": lambda sessions, owner, name: sessions.delete(owner, name),
    "export": lambda sessions, owner, name: sessions.export(owner, name),
    "open_export": lambda sessions, owner, name: sessions.open_export(owner, name),
    "events": lambda sessions, owner, name: sessions.events(owner, name),
}
CHANGING = ("begin", "fork", "rewind", "delete")


def test_what_is_opened_is_found(sessions: Any) -> None:
    made = sessions.open(OWNER, holding(b"abc"), {"name": "é"}, None)
    assert facts(sessions.find(OWNER, made.id)) == facts(made)
    assert (made.owner, made.position, made.metadata) == (OWNER, 3, {"name": "é"})
    assert (made.num_checkpoints, made.expires_at, made.context_start) == (0, None, 0)
    assert (made.is_durable, made.was_interrupted) == (True, False)
    assert text_of(sessions, made.id) == b"abc"


def test_an_empty_one_can_be_opened(sessions: Any) -> None:
    session_id = opened(sessions, b"")
    assert sessions.find(OWNER, session_id).position == 0
    assert take_turn(sessions, session_id).position == 2


@pytest.mark.parametrize("verb", VERBS)
def test_owners_see_their_own_alone(sessions: Any, verb: str) -> None:
    session_id = opened(sessions)
    take_turn(sessions, session_id)
    for owner, name in ((STRANGER, session_id), (OWNER, "unknown"), (STRANGER, "")):
        with pytest.raises(SessionNotFoundError):
            VERBS[verb](sessions, owner, name)
    assert sessions.page(STRANGER, None, 10) == ([], False)
    assert text_of(sessions, session_id) == b"abcde"


def test_a_turn_changes_it_when_it_is_committed(sessions: Any) -> None:
    session_id = opened(sessions)
    before = sessions.find(OWNER, session_id)
    turn = sessions.begin(OWNER, session_id)
    assert facts(turn.session) == facts(before)
    assert bytes(turn.state.recent) == b"abc"
    assert sessions.find(OWNER, session_id).residence == "resident"
    assert sessions.find(OWNER, session_id).position == 3
    after = commit(sessions, turn, turn.state.extended(b"d", b"e", WINDOW))
    assert (after.position, after.num_checkpoints) == (5, 1)
    assert after.version > before.version
    assert after.residence == "parked"
    assert facts(sessions.find(OWNER, session_id)) == facts(after)
    assert text_of(sessions, session_id) == b"abcde"


def test_an_abandoned_turn_was_none(sessions: Any) -> None:
    session_id = opened(sessions)
    before = facts(sessions.find(OWNER, session_id))
    turn = sessions.begin(OWNER, session_id)
    sessions.abandon(turn)
    assert facts(sessions.find(OWNER, session_id)) == before
    sessions.abandon(turn)  # it has ended
    other = sessions.begin(OWNER, session_id)
    sessions.abandon(turn)  # and the one that runs is another
    with pytest.raises(SessionBusyError):
        sessions.begin(OWNER, session_id)
    assert commit(sessions, other, other.state.extended(b"d", (), WINDOW)).position == 4


def test_a_turn_that_has_ended_cannot_be_committed(sessions: Any) -> None:
    session_id = opened(sessions)
    turn = sessions.begin(OWNER, session_id)
    sessions.abandon(turn)
    with pytest.raises(SessionMovedError):
        commit(sessions, turn, turn.state.extended(b"d", (), WINDOW))
    assert text_of(sessions, session_id) == b"abc"


@pytest.mark.parametrize("verb", CHANGING)
def test_while_a_turn_runs_nothing_else_may_change_it(sessions: Any, verb: str) -> None:
    session_id = opened(sessions)
    take_turn(sessions, session_id)
    turn = sessions.begin(OWNER, session_id)
    with pytest.raises(SessionBusyError):
        VERBS[verb](sessions, OWNER, session_id)
    assert sessions.export(OWNER, session_id)[0].position == 5
    assert commit(sessions, turn, turn.state.extended(b"f", (), WINDOW)).position == 6
    VERBS[verb](sessions, OWNER, session_id)


@pytest.mark.parametrize("verb", ["begin", "fork", "rewind"])
def test_what_expects_another_position_changes_nothing(sessions: Any, verb: str) -> None:
    session_id = opened(sessions)
    take_turn(sessions, session_id)
    before = facts(sessions.find(OWNER, session_id))
    arguments = (OWNER, session_id, 1) if verb == "fork" else (OWNER, session_id)
    with pytest.raises(SessionMovedError):
        getattr(sessions, verb)(*arguments, expected_position=3)
    assert facts(sessions.find(OWNER, session_id)) == before
    getattr(sessions, verb)(*arguments, expected_position=5)


def test_a_rewind_takes_back_turn_after_turn(sessions: Any) -> None:
    session_id = opened(sessions)
    versions = [sessions.find(OWNER, session_id).version]
    versions += [take_turn(sessions, session_id, text).version for text in (b"de", b"f")]
    for text in (b"abcde", b"abc"):
        session = sessions.rewind(OWNER, session_id)
        versions.append(session.version)
        assert session.position == len(text)
        assert text_of(sessions, session_id) == text
    assert session.num_checkpoints == 0
    with pytest.raises(NothingToRewindError):
        sessions.rewind(OWNER, session_id)
    assert text_of(sessions, session_id) == b"abc"
    assert versions == sorted(set(versions)), "a version is never told twice"


def test_forks_may_have_metadata_of_their_own(sessions: Any) -> None:
    name = opened(sessions)
    [fork] = sessions.fork(OWNER, name, 1, None, {"a": "b"})
    assert (fork.metadata, sessions.find(OWNER, name).metadata) == ({"a": "b"}, {})


def test_forks_go_their_own_ways_and_have_the_same_past(sessions: Any) -> None:
    until = sessions.open(OWNER, holding(b"abc"), {"a": "b"}, 600.0)
    take_turn(sessions, until.id)
    forks = sessions.fork(OWNER, until.id, 2)
    assert len({until.id, *(fork.id for fork in forks)}) == 3
    for fork in forks:
        assert (fork.owner, fork.position, fork.metadata) == (OWNER, 5, {"a": "b"})
        assert (fork.expires_at, fork.num_checkpoints) == (until.expires_at, 1)
    take_turn(sessions, forks[0].id, b"x")
    assert sessions.rewind(OWNER, forks[1].id).position == 3
    names = (until.id, forks[0].id, forks[1].id)
    assert [text_of(sessions, name) for name in names] == [b"abcde", b"abcdex", b"abc"]


def test_what_is_deleted_is_unknown(sessions: Any) -> None:
    kept, gone = opened(sessions), opened(sessions)
    sessions.delete(OWNER, gone)
    for verb in VERBS.values():
        with pytest.raises(SessionNotFoundError):
            verb(sessions, OWNER, gone)
    assert [each.id for each in sessions.page(OWNER, None, 10)[0]] == [kept]


def test_pages_are_newest_first(sessions: Any) -> None:
    names = [opened(sessions) for _ in range(5)][::-1]
    opened(sessions, owner=STRANGER)

    def page(after: str | None, limit: int) -> tuple[list[str], bool]:
        found, has_more = sessions.page(OWNER, after, limit)
        return [each.id for each in found], has_more

    assert page(None, 5) == (names, False)
    assert page(None, 2) == (names[:2], True)
    assert page(names[1], 2) == (names[2:4], True)
    assert page(names[3], 2) == (names[4:], False)
    assert page(names[4], 2) == ([], False)
    with pytest.raises(SessionNotFoundError):
        page("unknown", 2)


def test_what_is_past_its_time_is_unknown(sessions: Any) -> None:
    kept, gone = opened(sessions), sessions.open(OWNER, holding(b"abc"), {}, 0.01)
    assert gone.expires_at is not None

    def is_found() -> bool:
        with contextlib.suppress(SessionNotFoundError):
            return bool(sessions.find(OWNER, gone.id))
        return False

    eventually(lambda: not is_found())
    for verb in VERBS.values():
        with pytest.raises(SessionNotFoundError):
            verb(sessions, OWNER, gone.id)
    assert [each.id for each in sessions.page(OWNER, None, 10)[0]] == [kept]


def test_a_snapshot_is_a_session_again(sessions: Any) -> None:
    session_id = opened(sessions)
    take_turn(sessions, session_id)
    session, raw = sessions.export(OWNER, session_id)
    assert facts(session) == facts(sessions.find(OWNER, session_id))
    same, snapshot = sessions.open_export(OWNER, session_id)
    assert facts(same) == facts(session)
    pieces = [snapshot.read(start, 7) for start in range(0, snapshot.nbytes, 7)]
    assert b"".join(pieces) == raw
    snapshot.close()
    snapshot.close()
    checked: list[SessionState] = []
    made = sessions.import_(STRANGER, raw, {"a": "b"}, None, checked.append)
    assert [bytes(state.recent) for state in checked] == [b"abcde"]
    assert (made.owner, made.position, made.metadata) == (STRANGER, 5, {"a": "b"})
    assert made.num_checkpoints == 0
    assert sessions.export(STRANGER, made.id)[1] == raw


def test_what_is_no_snapshot_or_of_no_use_makes_no_session(sessions: Any) -> None:
    def refuse(_: SessionState) -> None:
        raise ValueError("of no use")

    _, raw = sessions.export(OWNER, opened(sessions))
    with pytest.raises(SnapshotError):
        sessions.import_(STRANGER, b"nothing of the kind", {}, None, lambda _: None)
    with pytest.raises(ValueError, match="of no use"):
        sessions.import_(STRANGER, raw, {}, None, refuse)
    assert sessions.page(STRANGER, None, 10) == ([], False)


def test_of_a_turn_without_events_none_are_kept(sessions: Any) -> None:
    session_id = opened(sessions)
    assert sessions.events(OWNER, session_id) == EventLog()
    take_turn(sessions, session_id)
    assert sessions.events(OWNER, session_id) == EventLog()


def test_one_may_have_an_id_and_events_from_the_beginning(sessions: Any) -> None:
    """Responses are such sessions: their ids are told before they are stored."""
    log = EventLog("0" * 16, 0, (b"what it answers",))
    chosen = "sess-" + "a" * 32
    assert (
        sessions.open(OWNER, holding(b"abc"), {}, None, session_id=chosen, events=log).id == chosen
    )
    assert sessions.events(OWNER, chosen) == log
    state, events = sessions.value(OWNER, chosen)
    assert (state.recent, events) == (holding(b"abc").recent, log)
    with pytest.raises(SessionNotFoundError):
        sessions.value(STRANGER, chosen)


def test_each_session_is_counted_once(sessions: Any) -> None:
    names = [opened(sessions) for _ in range(3)]
    turn = sessions.begin(OWNER, names[0])
    sizes = sessions.sizes()
    assert (sizes.num_resident, sizes.num_parked, sizes.num_stored) == (1, 2, 0)
    assert sizes.num_unsaved == 0
    sessions.abandon(turn)
    assert sessions.sizes().num_resident == 0


def test_a_snapshot_is_read_without_a_session(sessions: Any) -> None:
    """A client that keeps its state itself leaves nothing behind."""
    raw = sessions.snapshot(holding(b"abc"))
    checked: list[SessionState] = []
    state = sessions.read_snapshot(raw, checked.append)
    assert (bytes(state.recent), checked) == (b"abc", [state])
    assert sessions.page(OWNER, None, 10) == ([], False)
    assert sessions.export(OWNER, opened(sessions))[1] == raw, "it is what a session's would be"
    with pytest.raises(SnapshotError):
        sessions.read_snapshot(b"no snapshot", checked.append)

    def refuse(_: SessionState) -> None:
        raise KeyError("of no use here")

    with pytest.raises(KeyError, match="of no use here"):
        sessions.read_snapshot(raw, refuse)


def test_a_turn_may_leave_no_way_back(sessions: Any) -> None:
    """A response that has ended is not to go back to before its answer."""
    session_id = opened(sessions)
    take_turn(sessions, session_id)
    turn = sessions.begin(OWNER, session_id)
    state = turn.state.extended(b"f", (), WINDOW)
    assert sessions.commit(turn, state, max_checkpoints=0).num_checkpoints == 0
    with pytest.raises(NothingToRewindError):
        sessions.rewind(OWNER, session_id)
    assert text_of(sessions, session_id) == b"abcdef"

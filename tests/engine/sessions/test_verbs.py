"""Sessions over a real store: every verb, who may use it, a full disk, a restart."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from cottention.engine.errors import (
    NothingToRewindError,
    SessionBusyError,
    SessionMovedError,
    SessionNotFoundError,
    SnapshotError,
    StoreFullError,
)
from cottention.engine.sessions.fingerprint import Fingerprint
from cottention.engine.sessions.manager import LEASE_SECONDS, Session, SessionManager
from cottention.engine.sessions.memory_usage import VALUE_BYTES
from cottention.engine.sessions.snapshot import SnapshotCodec
from cottention.engine.sessions.store import Lease, SessionRecord, SqliteStore
from cottention.engine.sessions.store.protocol import BlobReader
from cottention.engine.state.context_window import context_schedules
from cottention.engine.state.event_log import EventLog
from cottention.engine.state.session_state import SessionState
from tests.engine.making import small_spec, state_of

pytestmark = pytest.mark.every_session

WINDOW = 8


class FullAtTimes(SqliteStore):
    """A store whose disk can be filled."""

    is_full = False

    def commit(self, *args: Any, **options: Any) -> SessionRecord:
        if self.is_full:
            raise StoreFullError("no space")
        return super().commit(*args, **options)


class SmallSessions(SessionManager):
    """Those of a small model with attention of some kind."""

    def __init__(
        self, store: SqliteStore, attention: str, *, memory_bytes: int, max_checkpoints: int = 2
    ) -> None:
        self.spec = small_spec(attention)
        prints = Fingerprint("w", "t", "c", "l")
        self.codec = SnapshotCodec(prints, self.spec, 1000, context_schedules(WINDOW), WINDOW)
        super().__init__(
            store,
            self.codec,
            memory_bytes=memory_bytes,
            max_checkpoints=max_checkpoints,
            is_durable=True,
        )

    def state(self, n: int) -> SessionState:
        """Of n tokens, all but the last in rows that tell n."""
        return state_of(self.spec, n, WINDOW)


Opener = Callable[..., SmallSessions]


@pytest.fixture
def opened(tmp_path: Path, attention: str) -> Iterator[Opener]:
    """Opens the folder; what was open is closed before."""
    last: list[SmallSessions] = []

    def open_(memory_bytes: int = 1 << 20, max_checkpoints: int = 2) -> SmallSessions:
        for sessions in last:
            sessions.close()
        store = FullAtTimes(tmp_path / "sessions", durable=False)
        memory = {"memory_bytes": memory_bytes, "max_checkpoints": max_checkpoints}
        last[:] = [SmallSessions(store, attention, **memory)]
        return last[0]

    yield open_
    for sessions in last:
        sessions.close()


@pytest.fixture
def sessions(opened: Opener) -> SmallSessions:
    return opened()


def make(sessions: SmallSessions, n: int = 1, owner: str = "a") -> Session:
    return sessions.open(owner, sessions.state(n), {"name": str(n)}, None)


def turn(sessions: SmallSessions, session_id: str, n: int, owner: str = "a") -> Session:
    return sessions.commit(sessions.begin(owner, session_id), sessions.state(n))


def holds(sessions: SmallSessions, session_id: str, n: int) -> bool:
    """The value, in memory or not, and as exported, is that of n tokens."""
    begun = sessions.begin("a", session_id)
    sessions.abandon(begun)
    return (
        sessions.codec.encode(begun.state)
        == sessions.codec.encode(sessions.state(n))
        == sessions.export("a", session_id).raw
        and sessions.find("a", session_id).position == n
    )


def set_full(sessions: SmallSessions, is_full: bool) -> None:
    sessions._store.is_full = is_full  # type: ignore[attr-defined]


def during_the_next_read(sessions: SmallSessions, happen: Callable[[], None]) -> None:
    """Let it happen once, after a state's file has been opened and before anybody has its bytes."""
    open_blob = sessions._store.open_blob

    def late(*part: Any) -> BlobReader:
        sessions._store.open_blob = open_blob  # type: ignore[method-assign]
        opened = open_blob(*part)
        happen()
        return opened

    sessions._store.open_blob = late  # type: ignore[method-assign]


def test_open_find_and_turns(sessions: SmallSessions) -> None:
    made = make(sessions, 3)
    assert sessions.find("a", made.id) == made
    assert (made.version, made.position, made.residence, made.is_durable) == (1, 3, "parked", True)
    assert made.metadata == {"name": "3"}
    assert made.nbytes == len(sessions.codec.encode(sessions.state(3)))
    after = turn(sessions, made.id, 8)
    assert (after.version, after.position, after.num_checkpoints) == (2, 8, 1)
    assert holds(sessions, made.id, 8)


def test_policies_are_told_wherever_a_session_is(opened: Opener) -> None:
    sessions = opened()
    made = make(sessions, 3)
    assert (made.context_policy, made.context_start) == ("renew", 0)
    exact = replace(sessions.state(20), context_policy="exact")
    after = sessions.commit(sessions.begin("a", made.id), exact)
    assert (after.context_policy, after.context_start) == ("exact", 0)
    [fork] = sessions.fork("a", made.id, 1)
    old = turn(sessions, make(sessions).id, 20)
    assert (old.context_policy, old.context_start) == (
        "renew",
        context_schedules(WINDOW)["renew"].start(19),
    )
    set_full(sessions, True)
    unsaved = sessions.commit(sessions.begin("a", old.id), replace(exact, position=21))
    assert (unsaved.context_policy, unsaved.is_durable) == ("exact", False)
    sessions = opened(memory_bytes=0)
    assert sessions.find("a", fork.id).context_policy == "exact"
    assert sessions.rewind("a", made.id).context_policy == "renew"


def test_an_abandoned_turn_changes_nothing(sessions: SmallSessions) -> None:
    made = make(sessions)
    begun = sessions.begin("a", made.id)
    sessions.abandon(begun)
    sessions.abandon(begun)
    assert sessions.find("a", made.id) == made
    with pytest.raises(SessionMovedError):
        sessions.commit(begun, sessions.state(2))
    assert holds(sessions, made.id, 1)


def test_an_old_abandon_does_not_end_a_new_turn(sessions: SmallSessions) -> None:
    made = make(sessions)
    old = sessions.begin("a", made.id)
    sessions.abandon(old)
    sessions.begin("a", made.id)
    sessions.abandon(old)
    assert sessions.find("a", made.id).residence == "resident"
    with pytest.raises(SessionBusyError):
        sessions.begin("a", made.id)


VERBS: list[Callable[[SessionManager, str, str], object]] = [
    lambda sessions, owner, name: sessions.find(owner, name),
    lambda sessions, owner, name: sessions.delete(owner, name),
    lambda sessions, owner, name: sessions.begin(owner, name),
    lambda sessions, owner, name: sessions.fork(owner, name, 1),
    lambda sessions, owner, name: sessions.rewind(owner, name),
    lambda sessions, owner, name: sessions.export(owner, name),
]


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_somebody_elses_is_not_found(
    sessions: SmallSessions, verb: Callable[[SessionManager, str, str], object]
) -> None:
    made = make(sessions)
    for owner, name in (("b", made.id), ("a", "unknown")):
        with pytest.raises(SessionNotFoundError):
            verb(sessions, owner, name)
    assert holds(sessions, made.id, 1)


@pytest.mark.parametrize("verb", VERBS[1:5])
def test_one_writer(
    sessions: SmallSessions, verb: Callable[[SessionManager, str, str], object]
) -> None:
    made = make(sessions)
    begun = sessions.begin("a", made.id)
    with pytest.raises(SessionBusyError):
        verb(sessions, "a", made.id)
    assert sessions.commit(begun, sessions.state(5)).position == 5


def test_a_session_that_somebody_else_has_moved(sessions: SmallSessions) -> None:
    made = make(sessions)
    turn(sessions, made.id, 2)
    with pytest.raises(SessionMovedError, match="position 2, not at 1"):
        sessions.begin("a", made.id, expected_position=1)
    with pytest.raises(SessionMovedError):
        sessions.rewind("a", made.id, expected_position=1)
    sessions.abandon(sessions.begin("a", made.id, expected_position=2))


def test_forks_share_bytes_and_go_on_alone(sessions: SmallSessions) -> None:
    made = make(sessions)
    turn(sessions, made.id, 2)
    before = sessions.sizes()
    forks = sessions.fork("a", made.id, 3)
    after = sessions.sizes()
    assert after.stored_bytes == before.stored_bytes
    assert after.parked_bytes == before.parked_bytes
    assert after.num_parked == 4
    turn(sessions, forks[0].id, 9)
    assert [sessions.find("a", fork.id).position for fork in forks] == [9, 2, 2]
    assert holds(sessions, made.id, 2)
    assert sessions.rewind("a", forks[1].id).position == 1


def test_rewinding(sessions: SmallSessions) -> None:
    made = make(sessions)
    for n in (2, 3, 4):
        turn(sessions, made.id, n)
    for n in (3, 2):
        assert sessions.rewind("a", made.id).position == n
        assert holds(sessions, made.id, n)
    with pytest.raises(NothingToRewindError):
        sessions.rewind("a", made.id)
    assert holds(sessions, made.id, 2)


def test_residence(opened: Opener, attention: str) -> None:
    nbytes = state_of(small_spec(attention), 2, WINDOW).nbytes
    sessions = opened(memory_bytes=2 * (VALUE_BYTES + nbytes + 300))
    names = [make(sessions, n).id for n in (1, 2, 3)]
    where = [sessions.find("a", name).residence for name in names]
    assert where == ["stored", "parked", "parked"]
    begun = sessions.begin("a", names[0])
    assert sessions.codec.encode(begun.state) == sessions.codec.encode(sessions.state(1))
    where = [sessions.find("a", name).residence for name in names]
    assert where == ["resident", "stored", "parked"]
    sizes = sessions.sizes()
    assert (sizes.num_resident, sizes.num_parked, sizes.num_stored) == (1, 1, 1)
    sessions.abandon(begun)
    assert sessions.find("a", names[0]).residence == "parked"
    assert holds(sessions, names[1], 2)


def test_without_memory(opened: Opener) -> None:
    sessions = opened(memory_bytes=0, max_checkpoints=0)
    made = make(sessions)
    assert turn(sessions, made.id, 2).residence == "stored"
    assert holds(sessions, made.id, 2)
    assert sessions.sizes().parked_bytes == 0
    with pytest.raises(NothingToRewindError):
        sessions.rewind("a", made.id)


def test_pages_and_delete(sessions: SmallSessions) -> None:
    made = [make(sessions, n) for n in (1, 2, 3)]
    make(sessions, 4, owner="b")
    page, has_more = sessions.page("a", None, 2)
    assert ([s.position for s in page], has_more) == ([3, 2], True)
    assert [s.id for s in sessions.page("a", page[1].id, 2)[0]] == [made[0].id]
    sessions.delete("a", made[0].id)
    with pytest.raises(SessionNotFoundError):
        sessions.find("a", made[0].id)
    assert sessions.sizes().num_parked == 3


def test_an_expired_session_leaves_memory(sessions: SmallSessions) -> None:
    made = sessions.open("a", sessions.state(1), {}, 0.0)
    with pytest.raises(SessionNotFoundError):
        sessions.find("a", made.id)
    assert sessions.sizes().parked_bytes == 0


def test_what_is_past_its_time_is_deleted_in_portions(
    sessions: SmallSessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cottention.engine.sessions.manager.MAX_EXPIRED_AT_ONCE", 2)
    for n in range(5):
        sessions.open("a", sessions.state(n + 1), {}, 1e-9)
    kept = make(sessions, 9)
    assert [sessions.maintain() for _ in range(4)] == [True, True, False, False]
    sizes = sessions.sizes()
    assert (sizes.num_parked, sizes.num_stored) == (1, 0)
    assert sizes.stored_bytes == kept.nbytes
    assert holds(sessions, kept.id, 9)


def test_the_lease_of_a_turn_that_runs_lasts_on(tmp_path: Path, attention: str) -> None:
    """A turn may take longer than a lease, as long as the process tends its sessions."""
    now = [1000.0]
    store = SqliteStore(tmp_path / "sessions", durable=False, monotonic=lambda: now[0])
    kept = SmallSessions(store, attention, memory_bytes=0)
    tended, forgotten = (kept.open("a", kept.state(1), {}, None).id for _ in range(2))
    begun = kept.begin("a", tended)
    for _ in range(5):
        now[0] += LEASE_SECONDS * 0.9
        assert not kept.maintain()
        with pytest.raises(SessionBusyError):
            kept.begin("a", tended)
    assert kept.commit(begun, kept.state(2)).position == 2
    dead = kept.begin("a", forgotten)
    now[0] += LEASE_SECONDS * 1.1
    alive = kept.begin("a", forgotten)
    assert not kept.maintain(), "what was taken over is not taken back"
    with pytest.raises(SessionMovedError):
        kept.commit(dead, kept.state(2))
    assert kept.commit(alive, kept.state(3)).position == 3
    kept.close()


def with_events(sessions: SmallSessions, session_id: str, n: int) -> Session:
    """A turn that commits events."""
    logs = log(is_durable=True), log(is_durable=False)
    return sessions.commit(sessions.begin("a", session_id), sessions.state(n), *logs)


def log(*, is_durable: bool) -> EventLog:
    return EventLog("0123456789abcdef", 5, (b"durable" if is_durable else b"not durable",))


def test_the_events_of_the_last_turn(opened: Opener) -> None:
    sessions = opened(memory_bytes=0)
    made = make(sessions)
    assert sessions.events("a", made.id) == EventLog()
    with_events(sessions, made.id, 2)
    assert sessions.events("a", made.id) == log(is_durable=True)
    [fork] = sessions.fork("a", made.id, 1)
    sessions = opened()
    set_full(sessions, True)
    with_events(sessions, made.id, 3)
    assert sessions.events("a", made.id) == log(is_durable=False), "the disk was full"
    assert sessions.events("a", fork.id) == log(is_durable=True)
    set_full(sessions, False)
    turn(sessions, made.id, 4)
    assert sessions.events("a", made.id) == EventLog(), "the last turn kept nothing"
    assert sessions.rewind("a", made.id).position == 3
    assert sessions.events("a", made.id) == log(is_durable=False)
    assert sessions.rewind("a", made.id).position == 2
    assert sessions.events("a", made.id) == log(is_durable=True)
    with pytest.raises(SessionNotFoundError):
        sessions.events("b", made.id)


def test_a_fork_of_what_was_not_stored_has_its_events(opened: Opener) -> None:
    sessions = opened()
    made = make(sessions)
    set_full(sessions, True)
    with_events(sessions, made.id, 2)
    [fork] = sessions.fork("a", made.id, 1)
    set_full(sessions, False)
    sessions = opened()
    for name in (made.id, fork.id):
        assert sessions.events("a", name) == log(is_durable=False)
        assert holds(sessions, name, 2)


def test_events_are_beside_the_state_and_not_in_it(sessions: SmallSessions) -> None:
    """A snapshot is the same with and without them, and an import has none."""
    made = make(sessions)
    after = with_events(sessions, made.id, 2)
    session, raw = sessions.export("a", made.id)
    assert raw == sessions.codec.encode(sessions.state(2))
    assert session.nbytes == after.nbytes == len(raw) + len(log(is_durable=True).to_bytes())
    moved = sessions.import_("a", raw, {}, None, lambda _: None)
    assert sessions.events("a", moved.id) == EventLog()
    for extra in (b"x", log(is_durable=True).to_bytes()):
        with pytest.raises(SnapshotError):
            sessions.import_("a", raw + extra, {}, None, lambda _: None)


@pytest.mark.parametrize("is_full", [False, True])
def test_the_preview_of_a_turn_is_what_its_commit_returns(opened: Opener, is_full: bool) -> None:
    """The last events of a turn are made from it, before the turn is stored."""
    sessions = opened()
    made = make(sessions, WINDOW)
    set_full(sessions, is_full)
    begun = sessions.begin("a", made.id)
    preview = sessions.preview(begun, sessions.state(20))
    after = sessions.commit(begun, sessions.state(20))
    assert preview.context_start > made.context_start
    assert (after.is_durable, preview.is_durable) == (not is_full, True)
    same = ("id", "owner", "position", "context_policy", "context_start", "metadata", "expires_at")
    assert all(getattr(preview, name) == getattr(after, name) for name in same)


def test_a_turn_takes_two_transactions(sessions: SmallSessions) -> None:
    """Begin leases and reads, commit writes and releases; nothing is read before either."""
    made = make(sessions)
    for n in (2, 3):
        turn(sessions, made.id, n)
    statements: list[str] = []
    db = sessions._store._index._db  # type: ignore[attr-defined]
    db.set_trace_callback(statements.append)
    begun = sessions.begin("a", made.id)
    in_begin = len([*groupby(statements)])  # a statement is traced again for each of its triggers
    sessions.commit(begun, sessions.state(4), log(is_durable=True))
    db.set_trace_callback(None)
    words = [statement.split()[0] for statement, _ in groupby(statements)]
    transaction = ["PRAGMA", "BEGIN", "UPDATE"]
    assert words[:in_begin] == [*transaction, "SELECT", "COMMIT"]
    commit = [*transaction, "INSERT", "DELETE", "SELECT", "COMMIT"]
    assert words[in_begin:] == [*commit, "SELECT"], "the last looks for the blob that was dropped"
    assert words.count("BEGIN") == 2
    assert db.execute("SELECT count(*) FROM sessions WHERE lease_owner NOT NULL").fetchone() == (0,)


def test_a_turn_of_somebody_elses_session_takes_no_lease(sessions: SmallSessions) -> None:
    """Not even for the time of a look: its owner would find it busy."""
    made = make(sessions)
    with pytest.raises(SessionNotFoundError):
        sessions.begin("b", made.id)
    assert sessions.begin("a", made.id).lease.fence == 1


def test_a_commit_that_another_turn_overtakes_leaves_nothing_old_in_memory(
    sessions: SmallSessions,
) -> None:
    """The session is free in the store before memory follows: another turn may end in between."""
    made = make(sessions)
    begun = sessions.begin("a", made.id)
    commit = sessions._store.commit

    def overtaken(*args: Any, **options: Any) -> SessionRecord:
        sessions._store.commit = commit  # type: ignore[method-assign]
        record = commit(*args, **options)
        set_full(sessions, True)
        assert not turn(sessions, made.id, 3).is_durable
        return record

    sessions._store.commit = overtaken  # type: ignore[method-assign]
    sessions.commit(begun, sessions.state(2))
    assert holds(sessions, made.id, 3), "the newer value, which is only in memory"
    set_full(sessions, False)
    assert turn(sessions, made.id, 4).num_checkpoints == 2
    assert sessions.rewind("a", made.id).position == 3


def test_a_session_that_is_deleted_during_a_commit_is_not_in_memory(
    sessions: SmallSessions,
) -> None:
    made = make(sessions)
    begun = sessions.begin("a", made.id)
    commit = sessions._store.commit

    def deleted(*args: Any, **options: Any) -> SessionRecord:
        record = commit(*args, **options)
        sessions.delete("a", made.id)
        return record

    sessions._store.commit = deleted  # type: ignore[method-assign]
    sessions.commit(begun, sessions.state(2))
    sizes = sessions.sizes()
    assert (sizes.num_resident, sizes.num_parked, sizes.num_stored) == (0, 0, 0)
    assert (sizes.parked_bytes, sizes.stored_bytes) == (0, 0)


def test_reading_what_a_turn_is_just_replacing(sessions: SmallSessions) -> None:
    """The head that was looked up is gone when it is read, and the new one is read instead."""
    made = make(sessions)
    open_blob = sessions._store.open_blob

    def late(*part: Any) -> BlobReader:
        sessions._store.open_blob = open_blob  # type: ignore[method-assign]
        for n in (2, 3, 4):  # more than there are checkpoints
            turn(sessions, made.id, n)
        return open_blob(*part)

    sessions._store.open_blob = late  # type: ignore[method-assign]
    assert sessions.export("a", made.id).raw == sessions.codec.encode(sessions.state(4))


def test_reading_while_a_turn_ends_on_a_full_disk(opened: Opener) -> None:
    """What is only in memory is not lost to somebody who still reads the head before it."""
    sessions = opened(memory_bytes=0)
    made = make(sessions)

    def turn_on_a_full_disk() -> None:
        set_full(sessions, True)
        assert not turn(sessions, made.id, 2).is_durable

    during_the_next_read(sessions, turn_on_a_full_disk)
    assert sessions.events("a", made.id) == EventLog()
    assert holds(sessions, made.id, 2)


def test_reading_what_is_damaged(opened: Opener, tmp_path: Path) -> None:
    sessions = opened(memory_bytes=0)
    made = make(sessions)
    [path] = (tmp_path / "sessions" / "states").glob("??/*")
    path.write_bytes(b"x" * made.nbytes)
    for read in (sessions.export, sessions.events):
        with pytest.raises(SnapshotError, match="damaged"):
            read("a", made.id)


def test_export_and_import(sessions: SmallSessions) -> None:
    raw = sessions.export("a", make(sessions, 7).id).raw
    checked: list[SessionState] = []
    moved = sessions.import_("b", raw, {}, None, checked.append)
    assert (moved.owner, moved.position) == ("b", 7)
    assert [each.num_tokens for each in checked] == [7]
    assert sessions.export("b", moved.id).raw == raw
    before = sessions.sizes()
    with pytest.raises(SnapshotError):
        sessions.import_("b", raw[:-1], {}, None, checked.append)
    with pytest.raises(ZeroDivisionError):
        sessions.import_("b", raw, {}, None, lambda state: state.position // 0)
    assert sessions.sizes() == before


def test_a_turn_on_a_full_disk(opened: Opener) -> None:
    sessions = opened(memory_bytes=0)
    made = make(sessions)
    set_full(sessions, True)
    for n in (2, 3):
        kept = turn(sessions, made.id, n)
        assert (kept.is_durable, kept.position, kept.residence) == (False, n, "parked")
        assert holds(sessions, made.id, n)
    [fork] = sessions.fork("a", made.id, 1)
    assert holds(sessions, fork.id, 3)
    set_full(sessions, False)
    assert turn(sessions, made.id, 4).is_durable
    assert sessions.sizes().parked_bytes == 0
    sessions = opened()
    assert holds(sessions, made.id, 4)
    assert sessions.rewind("a", made.id).position == 3


def test_an_ended_turn_is_not_kept_on_a_full_disk(sessions: SmallSessions) -> None:
    made = make(sessions)
    old = sessions.begin("a", made.id)
    sessions.abandon(old)
    set_full(sessions, True)
    with pytest.raises(SessionMovedError):
        sessions.commit(old, sessions.state(2))
    assert holds(sessions, made.id, 1)


@pytest.mark.parametrize("is_full", [True, False])
def test_what_was_not_stored_at_the_end(
    opened: Opener, is_full: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It is stored if there is room by then, else told; what was stored before is there."""
    sessions = opened()
    made = make(sessions)
    set_full(sessions, True)
    turn(sessions, made.id, 2)
    set_full(sessions, is_full)
    assert holds(opened(), made.id, 1 if is_full else 2)
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [made.id in line for line in errors] == [True] * is_full


def test_the_last_try_has_the_room_of_the_index_s_log(
    opened: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = opened()
    made = [make(sessions, n) for n in (1, 2, 3)]
    room, commit = num_bytes(tmp_path), sessions._store.commit

    def commit_if_there_is_room(*args: Any, **options: Any) -> SessionRecord:
        if num_bytes(tmp_path) + len(args[2]) > room:
            raise StoreFullError("no space")
        return commit(*args, **options)

    monkeypatch.setattr(sessions._store, "commit", commit_if_there_is_room)
    for each in made:
        assert not turn(sessions, each.id, each.position + 3).is_durable
    sessions = opened()
    assert all(holds(sessions, each.id, each.position + 3) for each in made)


def num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_lease_that_cannot_be_given_back_at_the_end(opened: Opener) -> None:
    """What is only in memory is stored none the less, and the folder is free for the next."""
    sessions = opened()
    made, other = make(sessions), make(sessions)
    set_full(sessions, True)
    turn(sessions, made.id, 2)
    set_full(sessions, False)
    sessions.begin("a", other.id)

    def refuse(_: Lease) -> None:
        raise StoreFullError("no space")

    sessions._store.release = refuse  # type: ignore[method-assign]
    sessions.close()
    sessions = opened()
    assert holds(sessions, made.id, 2)
    assert sessions.find("a", other.id).was_interrupted


def test_rewinding_what_was_not_stored(sessions: SmallSessions) -> None:
    made = make(sessions)
    set_full(sessions, True)
    turn(sessions, made.id, 2)
    back = sessions.rewind("a", made.id)
    assert (back.is_durable, back.position) == (True, 1)
    assert holds(sessions, made.id, 1)


def test_a_rewind_never_skips_a_turn_that_was_not_stored(opened: Opener) -> None:
    """Of the turns on a full disk the newest value alone is kept: the others are gone."""
    sessions = opened()
    made = make(sessions)
    turn(sessions, made.id, 2)
    set_full(sessions, True)
    told = [turn(sessions, made.id, n).num_checkpoints for n in (3, 4, 5)]
    assert told == [2, 0, 0]
    for is_full in (True, False):
        set_full(sessions, is_full)
        with pytest.raises(NothingToRewindError, match="the disk was full"):
            sessions.rewind("a", made.id)
        assert holds(sessions, made.id, 5)
    [fork] = sessions.fork("a", made.id, 1)
    assert fork.num_checkpoints == 0
    assert turn(sessions, made.id, 6).num_checkpoints == 1
    assert sessions.rewind("a", made.id).position == 5
    for name in (made.id, fork.id):
        with pytest.raises(NothingToRewindError):
            sessions.rewind("a", name)
        assert holds(sessions, name, 5)


def test_one_turn_on_a_full_disk_costs_no_checkpoint(sessions: SmallSessions) -> None:
    """The next turn stores both, and forks have its past as well."""
    made = make(sessions)
    set_full(sessions, True)
    turn(sessions, made.id, 2)
    [fork] = sessions.fork("a", made.id, 1)
    set_full(sessions, False)
    assert turn(sessions, made.id, 3).num_checkpoints == 2
    assert [sessions.rewind("a", made.id).position for _ in range(2)] == [2, 1]
    assert sessions.rewind("a", fork.id).position == 1


@pytest.mark.parametrize("num_turns", [1, 2])
def test_what_is_stored_at_the_end_can_be_rewound_unless_that_skips_a_turn(
    opened: Opener, num_turns: int
) -> None:
    sessions = opened()
    made = make(sessions)
    set_full(sessions, True)
    for n in range(num_turns):
        turn(sessions, made.id, 2 + n)
    set_full(sessions, False)
    sessions = opened()
    assert sessions.find("a", made.id).num_checkpoints == (1 if num_turns == 1 else 0)
    assert holds(sessions, made.id, 1 + num_turns)


def test_a_restart(opened: Opener) -> None:
    sessions = opened()
    made = make(sessions)
    turn(sessions, made.id, 2)
    [fork] = sessions.fork("a", made.id, 1)
    turn(sessions, fork.id, 3)
    cut = sessions.begin("a", fork.id)
    assert cut.session.residence == "resident"
    sessions = opened()
    assert sessions.find("a", made.id).residence == "stored"
    assert holds(sessions, made.id, 2)
    assert holds(sessions, fork.id, 3)
    assert sessions.rewind("a", made.id).position == 1


def test_a_lease_that_a_full_disk_does_not_take_back(
    sessions: SmallSessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was committed is free; otherwise the next turn waits for room, and not for the lease."""

    def full(*_: Any, **__: Any) -> None:
        raise StoreFullError("no space")

    made = make(sessions)
    begun = sessions.begin("a", made.id)
    monkeypatch.setattr(sessions._store, "release", full)
    assert sessions.commit(begun, sessions.state(2)).is_durable
    begun = sessions.begin("a", made.id)
    monkeypatch.setattr(sessions._store, "commit", full)
    assert sessions.commit(begun, sessions.state(3)).position == 3
    for _ in range(2):
        assert sessions.find("a", made.id).residence != "resident"
        with pytest.raises(StoreFullError):
            sessions.begin("a", made.id)
    monkeypatch.undo()
    assert holds(sessions, made.id, 3)
    sessions.abandon(sessions.begin("a", made.id))


def test_a_lease_is_not_in_the_way_of_the_last_try(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk took neither the turn nor its lease; at the end there is room."""

    def full(*_: Any, **__: Any) -> None:
        raise StoreFullError("no space")

    sessions = opened()
    made = make(sessions)
    begun = sessions.begin("a", made.id)
    monkeypatch.setattr(sessions._store, "commit", full)
    monkeypatch.setattr(sessions._store, "release", full)
    assert not sessions.commit(begun, sessions.state(2)).is_durable
    monkeypatch.undo()
    assert holds(opened(), made.id, 2)


@pytest.mark.parametrize("is_full", [False, True])
def test_an_export_s_session_and_bytes_are_of_one_moment(opened: Opener, is_full: bool) -> None:
    """A turn ends while the bytes are read: both are from before it, or both from after."""
    sessions = opened(memory_bytes=0)
    made = make(sessions)

    def another_turn() -> None:
        set_full(sessions, is_full)
        turn(sessions, made.id, 2)

    during_the_next_read(sessions, another_turn)
    for _ in range(2):
        session, raw = sessions.export("a", made.id)
        assert session.position == sessions.codec.decode(raw).num_tokens
    assert session.position == 2

"""A store that is refused something by the system, for whatever reason: no turn is lost.

Every operation that stores a turn is refused in turn, with reasons of several kinds; a closed list
of reasons would fail for those that it leaves out.
"""

import errno
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from cottention.engine.errors import SnapshotError, StoreFullError, StoreUnavailableError
from cottention.engine.sessions.maintenance import maintenance_thread
from cottention.engine.sessions.manager import SessionManager
from cottention.engine.sessions.store import SqliteStore, blobs
from tests.engine.sessions.kept import OWNER, kept, new, text_of, turn
from tests.server.live import eventually

Refusal = Callable[[SessionManager, Path, pytest.MonkeyPatch], None]


def system_call(name: str, number: int, where: str = "") -> Refusal:
    """Refuse a call of `os` for paths that contain `where`."""

    def refuse(_: SessionManager, __: Path, patch: pytest.MonkeyPatch) -> None:
        real = getattr(os, name)

        def call(path: Any, *args: Any, **named: Any) -> Any:
            if where in str(path):
                raise OSError(number, os.strerror(number), path)
            return real(path, *args, **named)

        patch.setattr(os, name, call)

    return refuse


class Refusing:
    """A connection of the index that is refused one statement."""

    def __init__(self, db: sqlite3.Connection, statement: str, error: Exception) -> None:
        self._db, self._statement, self._error = db, statement, error

    def __getattr__(self, name: str) -> object:
        return getattr(self._db, name)

    def execute(self, statement: str, *values: object) -> object:
        if statement.startswith(self._statement):
            raise self._error
        return self._db.execute(statement, *values)


def index(statement: str, code: int | None) -> Refusal:
    """Refuse a statement of the index with a code of SQLite's, or with none."""
    error = sqlite3.OperationalError("the index says no")
    if code is not None:
        error.sqlite_errorcode = code

    def refuse(sessions: SessionManager, _: Path, patch: pytest.MonkeyPatch) -> None:
        database = store_of(sessions)._index
        patch.setattr(database, "_db", Refusing(database._db, statement, error))

    return refuse


def store_of(sessions: SessionManager) -> SqliteStore:
    store = sessions._store
    assert isinstance(store, SqliteStore)
    return store


STAGING: dict[str, Refusal] = {
    "open: not permitted": system_call("open", errno.EPERM, "/states/new/"),
    "open: no such device": system_call("open", errno.ENXIO, "/states/new/"),
    "open: too many links": system_call("open", errno.ELOOP, "/states/new/"),
    "open: no memory": system_call("open", errno.ENOMEM, "/states/new/"),
    "open: an unknown number": system_call("open", 9999, "/states/new/"),
    "rename: read-only": system_call("replace", errno.EROFS, "/states/new/"),
    "rename: another device": system_call("replace", errno.EXDEV, "/states/new/"),
    "rename: busy": system_call("replace", errno.EBUSY, "/states/new/"),
    "rename: no connection": system_call("replace", errno.ENOTCONN, "/states/new/"),
}
INDEX: dict[str, Refusal] = {
    "begin: read-only": index("BEGIN", sqlite3.SQLITE_READONLY),
    "begin: locked": index("BEGIN", sqlite3.SQLITE_BUSY),
    "begin: cannot open": index("BEGIN", sqlite3.SQLITE_CANTOPEN),
    "insert: I/O error": index("INSERT INTO s", sqlite3.SQLITE_IOERR_WRITE),
    "commit: protocol": index("COMMIT", sqlite3.SQLITE_PROTOCOL),
    "commit: I/O error": index("COMMIT", sqlite3.SQLITE_IOERR_FSYNC),
    "commit: no code": index("COMMIT", None),
    "everything": index("", sqlite3.SQLITE_IOERR_LOCK),
}
WRITING = STAGING | INDEX


@pytest.fixture
def sessions(tmp_path: Path) -> Iterator[SessionManager]:
    made = kept(tmp_path / "kept")
    yield made
    made.close()


@contextmanager
def refused(sessions: SessionManager, folder: Path, refusal: Refusal) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        refusal(sessions, folder, patch)
        yield


@pytest.mark.parametrize("kind", WRITING)
def test_a_turn_is_kept_in_memory_and_stored_by_the_next(
    sessions: SessionManager, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    session_id = new(sessions)
    begun = sessions.begin(OWNER, session_id)
    with refused(sessions, tmp_path, WRITING[kind]):
        after = sessions.commit(begun, begun.state.extended(b"d", (), 512))
        assert (after.position, after.is_durable) == (4, False)
        with pytest.raises(StoreUnavailableError):
            sessions.open(OWNER, begun.state, {}, None)
    assert {(each.levelname, each.exc_info) for each in caplog.records} == {("WARNING", None)}
    assert len(caplog.messages) == len(set(caplog.messages)), "one line for each kind"
    assert (sessions.find(OWNER, session_id).is_durable, sessions.sizes().num_unsaved) == (False, 1)
    assert text_of(sessions, session_id) == b"abcd"
    after = turn(sessions, session_id)
    assert (after.is_durable, after.num_checkpoints) == (True, 2)
    sessions.close()
    again = kept(tmp_path / "kept")
    assert [again.rewind(OWNER, session_id).position for _ in range(2)] == [4, 3]
    again.close()


@pytest.mark.parametrize("kind", WRITING)
def test_a_turn_is_stored_at_the_end_or_named(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    for recovers, text in ((True, b"abcd"), (False, b"abc")):
        folder = tmp_path / str(recovers)
        sessions = kept(folder)
        session_id = new(sessions)
        begun = sessions.begin(OWNER, session_id)
        caplog.clear()
        with refused(sessions, folder, WRITING[kind]):
            sessions.commit(begun, begun.state.extended(b"d", (), 512))
            if not recovers:
                sessions.close()
        if recovers:
            sessions.close()
        else:  # SQLite's own connection is closed, whatever the test has put before it
            errors = [each for each in caplog.records if each.levelname == "ERROR"]
            assert [session_id in each.getMessage() for each in errors] == [True]
            assert not errors[0].exc_info
            assert "let the session folder take writes" in errors[0].getMessage()
        again = kept(folder)
        assert text_of(again, session_id) == text
        again.close()


@pytest.mark.parametrize("kind", STAGING)
def test_turns_go_on_while_states_are_refused(
    sessions: SessionManager, tmp_path: Path, kind: str
) -> None:
    """The index takes leases: any number of turns is answered."""
    session_id = new(sessions)
    with refused(sessions, tmp_path, STAGING[kind]):
        for n in range(3):
            assert not turn(sessions, session_id).is_durable
            assert text_of(sessions, session_id) == b"abc" + b"x" * (n + 1)
    assert turn(sessions, session_id).is_durable


@pytest.mark.parametrize("kind", [kind for kind in INDEX if not kind.startswith("insert")])
def test_a_turn_that_cannot_be_leased_does_not_begin(
    sessions: SessionManager, tmp_path: Path, kind: str
) -> None:
    session_id = new(sessions)
    with refused(sessions, tmp_path, INDEX[kind]):
        for _ in range(2):
            with pytest.raises(StoreUnavailableError):
                sessions.begin(OWNER, session_id)
    assert turn(sessions, session_id).is_durable


def remove_states(folder: Path) -> None:
    shutil.rmtree(folder / "states" / "new")


def put_a_file_there(folder: Path) -> None:
    remove_states(folder)
    (folder / "states" / "new").touch()


@pytest.mark.parametrize("spoil", [shutil.rmtree, remove_states, put_a_file_there])
def test_a_folder_that_is_taken_away(
    sessions: SessionManager, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    session_id = new(sessions)
    spoil(tmp_path / "kept")
    for _ in range(2):
        assert not turn(sessions, session_id).is_durable
    with pytest.raises(StoreUnavailableError) as caught:
        new(sessions)
    assert not isinstance(caught.value, StoreFullError)
    assert text_of(sessions, session_id) == b"abcxx"


def test_nothing_is_stored_in_an_index_that_was_removed(
    sessions: SessionManager, tmp_path: Path
) -> None:
    """Its file takes writes until it is closed, and nobody would find them."""
    session_id = new(sessions)
    (tmp_path / "kept" / "index.sqlite").unlink()
    with pytest.raises(StoreUnavailableError):
        sessions.fork(OWNER, session_id, 1)
    assert not turn(sessions, session_id).is_durable


@pytest.mark.parametrize("name", ["unlink", "stat"])
def test_a_turn_that_is_stored_does_not_fail_over_what_is_cleared_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Old states that cannot be removed only take space."""
    sessions = kept(tmp_path / "kept")
    session_id = new(sessions)
    begun = sessions.begin(OWNER, session_id)
    adopt, database = store_of(sessions)._blobs.adopt, store_of(sessions)._index

    def refused_from_then_on(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def adopt_last(staged: Any) -> None:
        adopt(staged)
        write = database.write

        def written(work: Any) -> Any:
            result = write(work)
            monkeypatch.setattr(Path, name, refused_from_then_on)
            return result

        monkeypatch.setattr(database, "write", written)

    monkeypatch.setattr(store_of(sessions)._blobs, "adopt", adopt_last)
    monkeypatch.setattr(sessions, "_max_checkpoints", 0)
    after = sessions.commit(begun, begun.state.extended(b"d", (), 512))
    assert (after.position, after.is_durable) == (4, True)
    monkeypatch.undo()
    assert turn(sessions, session_id).is_durable
    sessions.close()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.ESTALE, errno.EIO])
def test_what_cannot_be_read_now_is_not_called_damaged(
    sessions: SessionManager, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    session_id = new(sessions)
    sessions._cache.forget(session_id)

    def refuse(*_: object) -> BinaryIO:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(blobs, "open", refuse, raising=False)  # the builtin, as the module sees it
        for read in (sessions.begin, sessions.export, sessions.events):
            with pytest.raises(StoreUnavailableError, match="cannot be read"):
                read(OWNER, session_id)
    assert text_of(sessions, session_id) == b"abc"


def test_what_is_missing_is_damaged_unless_everything_is(
    sessions: SessionManager, tmp_path: Path
) -> None:
    session_id = new(sessions)
    sessions._cache.forget(session_id)
    [state] = (tmp_path / "kept" / "states").glob("??/*")
    state.unlink()
    with pytest.raises(SnapshotError):
        sessions.begin(OWNER, session_id)
    shutil.rmtree(tmp_path / "kept" / "states")
    with pytest.raises(StoreUnavailableError):
        sessions.begin(OWNER, session_id)


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, StoreFullError),
        (errno.EDQUOT, StoreFullError),
        (errno.EFBIG, StoreFullError),
        (errno.EROFS, StoreUnavailableError),
        (errno.EIO, StoreUnavailableError),
    ],
)
def test_a_full_disk_is_called_full(
    sessions: SessionManager, tmp_path: Path, number: int, error: type[Exception]
) -> None:
    refusal = system_call("open", number, "/states/new/")
    with refused(sessions, tmp_path, refusal), pytest.raises(error) as caught:
        new(sessions)
    assert type(caught.value) is error


def test_kinds_of_faults_are_logged_apart_and_seldom(
    sessions: SessionManager,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(store_of(sessions)._faults, "_clock", lambda: now[0])
    session_id = new(sessions)
    for number in (errno.EROFS, errno.EMFILE, errno.ENODEV) * 20:
        with refused(sessions, tmp_path, system_call("open", number, "/states/new/")):
            turn(sessions, session_id)
    assert sorted(caplog.messages) == [
        f"the session folder does not take writes: {os.strerror(number)}"
        for number in (errno.ENODEV, errno.EROFS, errno.EMFILE)
    ]
    now[0] += 61
    with refused(sessions, tmp_path, system_call("open", errno.EROFS, "/states/new/")):
        turn(sessions, session_id)
    assert caplog.messages[3:] == [
        "the session folder does not take writes: Read-only file system (19 times more before)"
    ]


def test_maintenance_goes_on_without_a_traceback(
    sessions: SessionManager, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new(sessions, ttl=0.001)
    with refused(sessions, tmp_path, index("BEGIN", sqlite3.SQLITE_READONLY)):
        calls = []

        def maintain() -> bool:
            calls.append(1)
            return sessions.maintain()

        with maintenance_thread(maintain, 0.01):
            eventually(lambda: len(calls) > 3)
    assert caplog.messages == ["the session folder does not take writes: the index says no"]
    assert not caplog.records[0].exc_info
    with maintenance_thread(sessions.maintain, 0.01):
        eventually(lambda: store_of(sessions).counts().num_sessions, equals=0)

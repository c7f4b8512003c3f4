"""What a store is after a kill, a second process, damaged files, or a full disk."""

import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import pytest

from cottention.engine.errors import (
    ConfigurationError,
    SnapshotError,
    StoreFullError,
    StoreUnavailableError,
)
from cottention.engine.sessions.store import NewSession, SessionRecord, SqliteStore
from cottention.engine.sessions.store.database import VERSION
from tests.engine.store_process import content, events

ROOT = Path(__file__).parents[4]


@contextmanager
def process(verb: str, folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """One that works on the folder and is killed at the end of the block."""
    command = [sys.executable, "-m", "tests.engine.store_process", verb, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as running:
        try:
            yield running
        finally:
            running.send_signal(signal.SIGKILL)


def make(store: SqliteStore, snapshot: bytes) -> SessionRecord:
    [record] = store.create([NewSession("a", 1, snapshot=snapshot)])
    return record


def turn(store: SqliteStore, session_id: str, snapshot: bytes) -> SessionRecord:
    lease, _ = store.acquire(session_id, 60)
    return store.commit(lease, lease.version, snapshot, 2, 2)


def blob(folder: Path, digest: str) -> Path:
    return folder / "states" / digest[:2] / digest


def lines_until_killed(folder: Path, seconds: float) -> list[list[str]]:
    """What a process said of its puts before it was killed."""
    with process("put", folder) as running:
        assert running.stdout is not None
        first = running.stdout.readline()
        time.sleep(seconds)
        running.kill()
        said = first + running.stdout.read()
    return [line.split() for line in said.splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(n, marks=pytest.mark.slow) for n in range(4, 20))]
)
def test_a_kill_loses_nothing_that_was_answered(tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "sessions"
    said = lines_until_killed(folder, random.Random(seed).uniform(0, 0.15))
    store = SqliteStore(folder)
    last = {session_id: (word, int(version)) for word, session_id, version in said}
    assert last
    num_begun_unsaid = 0
    for session_id, (word, version) in last.items():
        record = store.record(session_id)
        # one put may have been done and not yet printed, or one turn begun and not yet printed
        assert record.version in (version, version + 1)
        if word == "begun" and record.version == version:
            assert record.was_interrupted
        if word == "put" and record.version == version:
            num_begun_unsaid += record.was_interrupted
        if record.version > 1:
            snapshot, log = record.split(store.get(record.head))
            assert snapshot == content(session_id, record.version)
            assert log == events(record.version)
        for age, digest in enumerate(reversed(record.checkpoints), 1):
            if (old := record.version - age) > 1:
                assert store.get(digest) == content(session_id, old) + events(old)
        again = turn(store, session_id, b"goes on")
        assert (again.version, again.was_interrupted) == (record.version + 1, False)
    assert num_begun_unsaid <= 1
    store.close()


def test_a_cut_turn_says_so_until_the_next_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = SqliteStore(tmp_path)
    cut, done, idle = (make(store, b"%d" % n) for n in range(3))
    store.acquire(cut.id, 1000)
    lease, _ = store.acquire(done.id, 1000)
    # its turn was answered; the lease was still to be released
    store.commit(lease, 1, b"new", 2, 2, keeps_lease=True)
    store.close()
    with caplog.at_level(logging.WARNING):
        store = SqliteStore(tmp_path)
    found = [store.record(record.id).was_interrupted for record in (cut, done, idle)]
    assert found == [True, False, False]
    assert [cut.id in line for line in caplog.messages] == [True]
    store.close()
    store = SqliteStore(tmp_path)
    assert store.record(cut.id).was_interrupted
    assert not turn(store, cut.id, b"again").was_interrupted
    store.close()


def test_a_folder_belongs_to_one_process(tmp_path: Path) -> None:
    folder = tmp_path / "sessions"
    with process("hold", folder) as running:
        assert running.stdout is not None
        running.stdout.readline()
        with pytest.raises(ConfigurationError, match=str(running.pid)):
            SqliteStore(folder)
        running.kill()
        running.wait()
        SqliteStore(folder).close()


def test_it_cannot_be_opened_twice_in_one_process_either(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    with pytest.raises(ConfigurationError):
        SqliteStore(tmp_path)
    store.close()
    store.close()
    SqliteStore(tmp_path).close()


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError):
        SqliteStore(tmp_path / "file")


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_session_is_set_aside(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = SqliteStore(tmp_path)
    bad, good = make(store, b"bad"), make(store, b"good")
    kept = bad.head
    bad = turn(store, bad.id, b"worse")
    store.close()
    path = blob(tmp_path, bad.head)
    path.unlink() if damage == "missing" else os.truncate(path, 2)
    store = SqliteStore(tmp_path)
    assert store.list("a", None, 10)[0] == [good]
    assert any(bad.id in line and bad.head in line for line in caplog.messages)
    store.close()
    SqliteStore(tmp_path).close()
    assert blob(tmp_path, kept).read_bytes() == b"bad"  # what is left of it stays


def test_a_damaged_checkpoint_costs_the_turns_before_it(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    record = make(store, b"1")
    for n in (2, 3):
        record = turn(store, record.id, b"%d" % n)
    store.close()
    blob(tmp_path, record.checkpoints[1]).unlink()
    store = SqliteStore(tmp_path)
    found = store.record(record.id)
    assert (found.head, found.checkpoints) == (record.head, ())
    assert not blob(tmp_path, record.checkpoints[0]).exists()
    store.close()


def test_other_bytes_of_the_same_size_are_found_when_read(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    record = make(store, b"good")
    blob(tmp_path, record.head).write_bytes(b"evil")
    with pytest.raises(SnapshotError, match="damaged"):
        store.get(record.head)
    other = make(store, b"good")  # and written again when they are stored again
    assert store.get(other.head) == b"good"
    store.close()


def test_what_nobody_refers_to_is_swept(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    record = make(store, b"kept")
    store.close()
    orphan = blob(tmp_path, "ab" * 32)
    orphan.parent.mkdir()
    orphan.write_bytes(b"renamed, and then the power went")
    half = tmp_path / "states" / "new" / "half"
    half.write_bytes(b"half")
    store = SqliteStore(tmp_path)
    assert not orphan.exists()
    assert not half.exists()
    assert store.get(record.head) == b"kept"
    assert store.counts().blob_bytes == 4
    store.close()


@pytest.mark.parametrize("damage", ["garbage", "middle", "cut", "empty", "missing"])
def test_a_damaged_index_is_kept_beside_a_new_one(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    index = tmp_path / "index.sqlite"
    for n in (1, 2):
        store = SqliteStore(tmp_path)
        record = make(store, b"kept %d" % n)
        store.close()
        size = index.stat().st_size
        if damage == "garbage":
            index.write_bytes(random.Random(n).randbytes(size))
        elif damage == "middle":
            raw = bytearray(index.read_bytes())
            raw[4096:] = random.Random(n).randbytes(size - 4096)
            index.write_bytes(raw)
        elif damage == "cut":
            os.truncate(index, 4096 * 3)
        elif damage == "empty":
            os.truncate(index, 0)
        else:
            index.unlink()
        caplog.clear()
        store = SqliteStore(tmp_path)
        assert store.list("a", None, 10) == ([], False)
        assert any("index.sqlite" in line and "damaged" in line for line in caplog.messages)
        make(store, b"new")
        store.close()
        aside = tmp_path / f"states.damaged-{n}" / record.head[:2] / record.head
        assert aside.read_bytes() == b"kept %d" % n
        assert (tmp_path / f"index.sqlite.damaged-{n}").exists() == (damage != "missing")
        if n == 1:
            index.unlink()
            (tmp_path / "states").rename(tmp_path / "elsewhere")


@pytest.mark.parametrize("version", [VERSION - 1, 99])
def test_an_index_of_another_version_is_refused_and_not_changed(
    tmp_path: Path, version: int
) -> None:
    store = SqliteStore(tmp_path)
    record = make(store, b"kept")
    store.close()
    index = tmp_path / "index.sqlite"
    with closing(sqlite3.connect(index)) as db:
        db.execute(f"PRAGMA user_version = {version}")
    before = index.read_bytes()
    with pytest.raises(ConfigurationError) as caught:
        SqliteStore(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{index} has format version {version}, ")
    assert "give --session-dir another folder" in message
    assert index.read_bytes() == before
    assert blob(tmp_path, record.head).read_bytes() == b"kept"


def test_a_snapshot_that_the_disk_does_not_take(tmp_path: Path) -> None:
    folder = tmp_path / "sessions"
    with process("fill", folder) as running:
        said, _ = running.communicate(timeout=60)
    assert said.splitlines() == ["full", "is 1 small", "put 2"]
    assert len([path for path in (folder / "states").rglob("*") if path.is_file()]) == 2


def fill_disk(disk: Path) -> None:
    (disk / "rest").write_bytes(bytes(os.statvfs(disk).f_bavail * 4096))


def test_a_full_disk_loses_nothing_and_turns_go_on(small_disk: Path) -> None:
    """Leases and deletions work on it without end; a put does again when there is room."""
    store = SqliteStore(small_disk / "sessions")
    made: list[SessionRecord] = []
    with suppress(StoreFullError):
        while True:
            made.append(make(store, random.Random(len(made)).randbytes(500_000)))
    assert 5 < len(made) < 16
    fill_disk(small_disk)
    for n in range(1000):
        lease, _ = store.acquire(made[n % len(made)].id, 60)
        with pytest.raises(StoreFullError):
            store.commit(lease, 1, b"a small one", 2, 2)
        store.release(lease)
    store.close()
    store = SqliteStore(small_disk / "sessions")
    for n, record in enumerate(made):
        assert store.record(record.id) == record
        assert store.get(record.head) == random.Random(n).randbytes(500_000)
    store.delete(made[0].id)
    assert turn(store, made[1].id, b"there is room").version == 2
    store.close()


def test_what_was_kept_back_for_leases_is_there_for_states_at_the_end(small_disk: Path) -> None:
    """As much more is stored; the next start has little room then, and it is enough to go on."""
    store = SqliteStore(small_disk / "sessions")
    made = [make(store, b"%d" % n) for n in range(30)]
    fill_disk(small_disk)
    leases = [store.acquire(record.id, 60)[0] for record in made]
    with pytest.raises(StoreFullError):
        store.commit(leases[0], 1, bytes(4096), 2, 2)
    store.free_reserve()
    put = []
    for n, lease in enumerate(leases):
        with suppress(StoreFullError):
            put.append(store.commit(lease, 1, random.Random(n).randbytes(100_000), 2, 2))
    assert 10 < len(put) < len(made)
    with suppress(StoreFullError):
        while True:
            make(store, random.randbytes(4096))
    store.close()
    store = SqliteStore(small_disk / "sessions")
    for n in range(1000):
        store.release(store.acquire(made[n % len(made)].id, 60)[0])
    assert [store.record(record.id).head for record in put] == [record.head for record in put]
    store.delete(put[0].id)
    assert turn(store, put[1].id, b"there is room").version == 3
    store.close()


class Failing:
    """A connection whose commits fail in one way."""

    def __init__(self, db: sqlite3.Connection, code: int) -> None:
        self._db = db
        self._code = code

    def __getattr__(self, name: str) -> object:
        return getattr(self._db, name)

    def execute(self, statement: str, *values: object) -> object:
        if statement != "COMMIT":
            return self._db.execute(statement, *values)
        error = sqlite3.OperationalError("as the disk says")
        error.sqlite_errorcode = self._code
        raise error


@pytest.mark.parametrize(
    ("code", "error", "stays"),
    [
        (sqlite3.SQLITE_FULL, StoreFullError, False),
        (sqlite3.SQLITE_IOERR_FSYNC, StoreUnavailableError, True),
    ],
)
def test_a_commit_that_fails_keeps_the_old_head(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    error: type[StoreUnavailableError],
    stays: bool,
) -> None:
    """After a failed fsync a restart may still find the commit done: its file must be there."""
    store = SqliteStore(tmp_path)
    record = make(store, b"old")
    lease, _ = store.acquire(record.id, 60)
    with monkeypatch.context() as patch:
        patch.setattr(store._index, "_db", Failing(store._index._db, code))
        with pytest.raises(error) as caught:
            store.commit(lease, 1, b"new", 2, 0)
        assert type(caught.value) is error
        assert store.record(record.id) == record
    assert blob(tmp_path, sha256(b"new").hexdigest()).exists() == stays
    assert store.get(record.head) == b"old"
    assert store.commit(lease, 1, b"newer", 2, 0).version == 2
    assert not blob(tmp_path, record.head).exists()
    store.close()
    SqliteStore(tmp_path).close()
    assert not blob(tmp_path, sha256(b"new").hexdigest()).exists()


def test_an_index_that_is_locked_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cottention.engine.sessions.store.database.MAX_WAIT", 0.1)
    store = SqliteStore(tmp_path)
    record = make(store, b"kept")
    store.close()
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as db:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ConfigurationError, match="locked"):
            SqliteStore(tmp_path)
    store = SqliteStore(tmp_path)
    assert store.get(store.record(record.id).head) == b"kept"
    store.close()


def test_a_file_is_durable_before_the_index_refers_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a loss of power would show, and a kill does not: the order of the system calls."""
    store = SqliteStore(tmp_path)
    record = make(store, b"old")
    lease, _ = store.acquire(record.id, 60)
    order: list[str] = []

    def watched(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def run(*values: object) -> object:
            order.append(name)
            return call(*values)

        return run

    monkeypatch.setattr(os, "fsync", watched("sync", os.fsync))
    monkeypatch.setattr(os, "replace", watched("name", os.replace))
    monkeypatch.setattr(store._index, "_commit", watched("commit", store._index._commit))
    monkeypatch.setattr(store._blobs, "remove", watched("remove", store._blobs.remove))
    store.commit(lease, 1, b"new", 2, 0)
    # the file, then the folder of its digest, which is new, in that of all; the file's name in it
    assert order == ["sync", "sync", "name", "sync", "commit", "remove"]
    assert store._index._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    monkeypatch.undo()
    store.close()

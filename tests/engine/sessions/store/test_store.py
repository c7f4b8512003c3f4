"""What is peculiar to the store in a folder: its files."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from cottention.engine.errors import SnapshotError
from cottention.engine.sessions.store import NewSession, SessionRecord, SqliteStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    opened = SqliteStore(tmp_path / "sessions")
    yield opened
    opened.close()


def files(folder: Path) -> list[Path]:
    return [path for path in (folder / "states").rglob("*") if path.is_file()]


def make(store: SqliteStore, snapshot: bytes = b"one", owner: str = "a") -> SessionRecord:
    [record] = store.create([NewSession(owner, 1, snapshot=snapshot)])
    return record


def put(store: SqliteStore, session_id: str, snapshot: bytes, keep: int) -> SessionRecord:
    """A whole turn."""
    lease, _ = store.acquire(session_id, 60)
    return store.commit(lease, lease.version, snapshot, len(snapshot), keep)


def test_nothing_is_read_of_a_blob_that_has_changed_anywhere(
    store: SqliteStore, tmp_path: Path
) -> None:
    record = make(store, b"snapshot")
    [file] = files(tmp_path / "sessions")
    file.write_bytes(b"snapshoT")
    with pytest.raises(SnapshotError, match="damaged"):
        store.open_blob(record.head, 0, 4)


def test_nobody_else_can_read_the_folder(store: SqliteStore, tmp_path: Path) -> None:
    make(store)
    for path in [tmp_path / "sessions", *(tmp_path / "sessions").rglob("*")]:
        assert stat.S_IMODE(os.stat(path).st_mode) & 0o077 == 0, path


def test_a_blob_without_a_session_has_no_file(store: SqliteStore, tmp_path: Path) -> None:
    folder = tmp_path / "sessions"
    record = put(store, make(store).id, b"two", keep=0)
    [fork] = store.create([NewSession("a", record.position, head=record.head)])
    store.delete(record.id)
    assert [path.read_bytes() for path in files(folder)] == [b"two"]
    store.delete(fork.id)
    assert files(folder) == []

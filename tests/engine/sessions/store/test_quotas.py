"""What one owner's sessions may take, what forks share, and what goes back to the disk."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from cottention.engine.errors import SessionQuotaError
from cottention.engine.sessions.store import NewSession, SessionRecord, SessionStore, SqliteStore
from cottention.engine.sessions.store.protocol import Quota
from tests.engine.sessions.store.backends import Backend

METADATA = {f"name {n}": f"{n:02}" + "x" * 2_000 for n in range(16)}
QUOTAS = {"a": Quota(max_sessions=3, max_bytes=1000), "b": Quota()}


@pytest.fixture
def store(backend: Backend) -> Iterator[SessionStore]:
    opened = backend.open(QUOTAS.__getitem__)
    yield opened
    opened.close()


def make(store: SessionStore, nbytes: int, owner: str = "a") -> SessionRecord:
    [record] = store.create([NewSession(owner, 1, snapshot=bytes(nbytes))])
    return record


def fork_of(record: SessionRecord) -> NewSession:
    return NewSession(
        record.owner,
        record.position,
        head=record.head,
        checkpoints=record.checkpoints,
        metadata=record.metadata,
    )


def test_one_owner_s_quota_is_not_another_s(store: SessionStore) -> None:
    first = make(store, 100)
    store.create([fork_of(first)] * 2)
    with pytest.raises(SessionQuotaError, match="4 sessions, and 3 are allowed: delete"):
        store.create([fork_of(first)])
    for _ in range(5):
        make(store, 5000, owner="b")
    store.delete(first.id)
    make(store, 100)


def test_a_turn_beyond_the_quota_leaves_its_session_as_it_was(store: SessionStore) -> None:
    """Each session counts in full, with what it can be rewound to."""
    record = make(store, 400)
    store.create([fork_of(record)])
    lease, _ = store.acquire(record.id, 60, "a")
    with pytest.raises(SessionQuotaError, match="bytes of sessions, and 1000 are allowed"):
        store.commit(lease, 1, bytes(300), 2, 1, keeps_lease=True)
    assert store.record(record.id) == record
    assert len(store.get(record.head)) == 400
    smaller = store.commit(lease, 1, bytes(100), 2, 1, keeps_lease=True)  # the old one stays, too
    assert store.rewind(lease, smaller.version).position == 1
    assert [each.position for each in store.list("a", None, 9)[0]] == [1, 1]


def test_an_owner_beyond_a_quota_that_was_lowered_can_go_on_with_less(tmp_path: Path) -> None:
    with_more = SqliteStore(tmp_path / "sessions", durable=False)
    records = [make(with_more, 400) for _ in range(5)]
    with_more.close()
    store = SqliteStore(tmp_path / "sessions", durable=False, quotas=QUOTAS.__getitem__)
    lease, _ = store.acquire(records[0].id, 60, "a")
    assert store.commit(lease, 1, bytes(200), 2, 0).position == 2
    with pytest.raises(SessionQuotaError):
        make(store, 1)
    store.close()


def test_forks_share_their_metadata(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "sessions", durable=False)
    [first] = store.create([NewSession("a", 1, snapshot=b"one", metadata=METADATA)])
    index = tmp_path / "sessions" / "index.sqlite"
    before = index.stat().st_size
    forks = store.create([fork_of(first)] * 500)
    store.free_reserve()
    assert index.stat().st_size - before < 500 * 1000  # of 32,000 bytes of metadata each
    assert all(fork.metadata == METADATA for fork in forks)
    store.delete(first.id)
    for fork in forks[1:]:
        store.delete(fork.id)
    assert store.record(forks[0].id).metadata == METADATA
    store.delete(forks[0].id)
    store.close()
    with sqlite3.connect(index) as db:
        assert db.execute("SELECT count(*) FROM metadata").fetchone() == (0,)
        assert db.execute("SELECT count(*) FROM usage").fetchone() == (0,)


def test_space_of_deleted_sessions_goes_back_to_the_disk(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "sessions", durable=False)
    made = store.create(
        [
            NewSession("a", 1, snapshot=b"one", metadata={"n": f"{n:05}" + "x" * 30_000})
            for n in range(300)
        ]
    )
    for record in made:
        store.delete(record.id)
    store.free_reserve()
    index = tmp_path / "sessions" / "index.sqlite"
    assert index.stat().st_size > 9_000_000
    num_calls = 1
    while store.give_back():  # some at a time: turns wait for it
        num_calls += 1
    assert num_calls > 3
    store.free_reserve()
    assert index.stat().st_size < 4_000_000
    store.close()

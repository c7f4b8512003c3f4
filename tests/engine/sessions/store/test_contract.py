"""What every store promises: compare-and-set, fences, shared states, pages, times."""

import threading
from hashlib import sha256

import pytest

from cottention.engine.errors import (
    NothingToRewindError,
    SessionBusyError,
    SessionMovedError,
    SessionNotFoundError,
    SnapshotError,
)
from cottention.engine.sessions.store import (
    Lease,
    NewSession,
    SessionRecord,
    SessionStore,
    StoreCounts,
)
from tests.engine.sessions.store.backends import Backend


def make(store: SessionStore, snapshot: bytes = b"one", owner: str = "a") -> SessionRecord:
    [record] = store.create([NewSession(owner, 1, snapshot=snapshot)])
    return record


def put(store: SessionStore, session_id: str, snapshot: bytes, keep: int = 2) -> SessionRecord:
    """A whole turn."""
    lease, _ = store.acquire(session_id, 60)
    return store.commit(lease, lease.version, snapshot, len(snapshot), keep)


def test_a_new_session(store: SessionStore) -> None:
    until = store.now() + 9
    new = NewSession("a", 7, snapshot=b"state", metadata={"é": "1"}, expires_at=until)
    [made] = store.create([new])
    assert (made.owner, made.position, made.version, made.nbytes) == ("a", 7, 1, 5)
    assert (made.metadata, made.expires_at) == ({"é": "1"}, until)
    assert (made.checkpoints, made.was_interrupted) == ((), False)
    assert abs(made.created - store.unix_time(store.now())) < 2
    assert store.record(made.id) == made
    assert store.head(made.id) == 1
    assert store.get(made.head) == b"state"


def test_a_turn_moves_the_head_and_keeps_checkpoints(store: SessionStore) -> None:
    first = make(store)
    for n in range(2, 6):
        last = put(store, first.id, b"x" * n)
    assert (last.version, last.position, last.nbytes) == (5, 5, 5)
    assert [store.get(digest) for digest in last.checkpoints] == [b"xxx", b"xxxx"]
    with pytest.raises(SnapshotError):
        store.get(first.head)


def test_a_commit_releases_the_lease(store: SessionStore) -> None:
    record = make(store)
    lease, begun = store.acquire(record.id, 60, "a")
    assert (lease, begun) == (Lease(record.id, 1, 1), record)
    with pytest.raises(SessionMovedError):
        store.commit(lease, 2, b"two", 2, 2)
    with pytest.raises(SessionBusyError):
        store.acquire(record.id, 60, "a")
    after = store.commit(lease, 1, b"two", 2, 2, events=b" told")
    assert (after.version, after.position, after.checkpoints) == (2, 2, (record.head,))
    assert store.record(record.id) == after
    with pytest.raises(SessionMovedError):
        store.commit(lease, 2, b"three", 3, 2)
    assert store.acquire(record.id, 60, "a") == (Lease(record.id, 2, 2), after)


def test_events_go_where_their_snapshot_goes(store: SessionStore) -> None:
    """To forks, and back again with a rewind; a session's size has both."""
    record = make(store)
    for n in (2, 3):
        lease, _ = store.acquire(record.id, 60, "a")
        record = store.commit(lease, lease.version, b"x" * n, n, 2, events=b"event %d" % n)
    assert (record.nbytes, record.events_nbytes) == (10, 7)
    new = NewSession("a", 3, head=record.head, checkpoints=record.checkpoints)
    [fork] = store.create([new])
    for session_id in (record.id, fork.id):
        found = store.record(session_id)
        assert found.split(store.get(found.head)) == (b"xxx", b"event 3")
        lease, _ = store.acquire(session_id, 60)
        back = store.rewind(lease, lease.version)
        assert back.split(store.get(back.head)) == (b"xx", b"event 2")
        first = store.rewind(lease, back.version)
        assert first.split(store.get(first.head)) == (b"one", b"")
    assert store.counts().blob_bytes == 3


def test_a_part_of_a_blob_is_read_in_pieces_though_the_blob_is_removed(store: SessionStore) -> None:
    record = make(store, b"snapshot of a session")
    reader = store.open_blob(record.head, 9, 15)
    store.delete(record.id)
    assert reader.nbytes == 6
    assert [reader.read(0, 4), reader.read(4, 4), reader.read(6, 4)] == [b"of a", b" s", b""]
    reader.close()
    reader.close()
    with pytest.raises(SnapshotError, match="missing"):
        store.open_blob(record.head, 0, 1)


def test_a_session_is_begun_by_its_owner_alone(store: SessionStore, backend: Backend) -> None:
    """Whether somebody else's session is busy is not told, and its lease is not touched."""
    [record] = store.create([NewSession("a", 1, b"one", expires_at=store.now() + 10)])
    for _ in range(2):
        with pytest.raises(SessionNotFoundError):
            store.acquire(record.id, 60, "b")
        lease, _ = store.acquire(record.id, 5, "a")
        assert lease.fence in (1, 2)
        backend.pass_time(5)
    with pytest.raises(SessionNotFoundError):
        store.acquire(record.id, 60, "a")


def test_no_checkpoints(store: SessionStore) -> None:
    record = put(store, make(store).id, b"two", keep=0)
    assert record.checkpoints == ()
    assert store.counts().blob_bytes == 3


def test_a_commit_needs_the_version_that_is_there(store: SessionStore) -> None:
    record = make(store)
    lease, _ = store.acquire(record.id, 60)
    store.commit(lease, 1, b"two", 2, 2, keeps_lease=True)
    with pytest.raises(SessionMovedError):
        store.commit(lease, 1, b"three", 3, 2)
    with pytest.raises(SessionMovedError):
        store.rewind(lease, 1)
    assert store.get(store.record(record.id).head) == b"two"


def test_one_lease_at_a_time(store: SessionStore, backend: Backend) -> None:
    record = make(store)
    lease, _ = store.acquire(record.id, 60)
    assert lease == Lease(record.id, 1, 1)
    with pytest.raises(SessionBusyError):
        store.acquire(record.id, 60)
    with pytest.raises(SessionBusyError):
        store.delete(record.id)
    backend.pass_time(59)
    store.renew(lease, 60)
    backend.pass_time(59)
    with pytest.raises(SessionBusyError):
        store.acquire(record.id, 60)
    store.release(lease)
    store.release(lease)
    assert store.acquire(record.id, 60)[0].fence == 2


def test_a_writer_that_was_taken_over_is_fenced_off(store: SessionStore, backend: Backend) -> None:
    """It slept past its lease. The version is the one it knows: only the fence can tell."""
    record = make(store)
    zombie, _ = store.acquire(record.id, 60)
    backend.pass_time(61)
    other, _ = store.acquire(record.id, 60)
    assert other.fence > zombie.fence
    with pytest.raises(SessionMovedError):
        store.commit(zombie, 1, b"from the grave", 2, 2)
    with pytest.raises(SessionMovedError):
        store.rewind(zombie, 1)
    with pytest.raises(SessionMovedError):
        store.renew(zombie, 60)
    store.release(zombie)
    assert store.commit(other, 1, b"two", 2, 2).version == 2
    with pytest.raises(SnapshotError):
        store.get(sha256(b"from the grave").hexdigest())


def test_a_lease_past_its_time_is_good_until_it_is_taken_over(
    store: SessionStore, backend: Backend
) -> None:
    record = make(store)
    lease, _ = store.acquire(record.id, 60)
    backend.pass_time(61)
    assert store.commit(lease, 1, b"two", 2, 2).version == 2


def test_a_released_lease_is_no_right(store: SessionStore) -> None:
    record = make(store)
    lease, _ = store.acquire(record.id, 60)
    store.release(lease)
    with pytest.raises(SessionMovedError):
        store.commit(lease, 1, b"two", 2, 2)


def test_a_fence_grows_over_restarts(backend: Backend) -> None:
    store = backend.open()
    record = make(store)
    zombie, _ = store.acquire(record.id, 1000)
    store.close()
    store = backend.open()
    with pytest.raises(SessionMovedError):
        store.commit(zombie, 1, b"from the grave", 2, 2)
    assert store.acquire(record.id, 60)[0].fence > zombie.fence
    store.close()


def test_rewind_goes_back_turn_by_turn(store: SessionStore) -> None:
    record = make(store)
    put(store, record.id, b"two")
    put(store, record.id, b"three")
    lease, _ = store.acquire(record.id, 60)
    back = store.rewind(lease, 3)
    assert (store.get(back.head), back.position, back.version, back.nbytes) == (b"two", 3, 4, 3)
    back = store.rewind(lease, 4)
    assert (back.head, back.position, back.checkpoints) == (record.head, 1, ())
    with pytest.raises(NothingToRewindError):
        store.rewind(lease, 5)
    assert store.head(record.id) == 5
    assert store.commit(lease, 5, b"another", 7, 2).checkpoints == (record.head,)


def test_forks_share_states_until_the_last_one_goes(store: SessionStore) -> None:
    record = put(store, make(store).id, b"two")
    fork = NewSession("a", record.position, head=record.head, checkpoints=record.checkpoints)
    forks = store.create([fork] * 3)
    assert {(one.head, one.checkpoints, one.nbytes, one.version) for one in forks} == {
        (record.head, record.checkpoints, 3, 1)
    }
    assert store.counts() == StoreCounts(4, 6)
    store.delete(record.id)
    put(store, forks[0].id, b"own", keep=0)
    store.delete(forks[1].id)
    assert store.get(record.head) == b"two"
    lease, _ = store.acquire(forks[2].id, 60)
    assert store.get(store.rewind(lease, 1).head) == b"one"
    with pytest.raises(SnapshotError):
        store.get(record.head)
    store.release(lease)
    store.delete(forks[2].id)
    store.delete(forks[0].id)
    assert store.counts() == StoreCounts(0, 0)


def test_equal_bytes_are_stored_once(store: SessionStore) -> None:
    one, two = make(store, b"same"), make(store, b"same", owner="b")
    assert one.head == two.head
    assert store.counts() == StoreCounts(2, 4)
    store.delete(one.id)
    assert store.get(two.head) == b"same"
    put(store, two.id, b"same", keep=1)
    put(store, two.id, b"other", keep=0)
    assert store.counts() == StoreCounts(1, 5)


def test_all_are_made_or_none(store: SessionStore) -> None:
    with pytest.raises(SnapshotError):
        store.create([NewSession("a", 1, snapshot=b"x"), NewSession("a", 1, head="0" * 64)])
    assert store.list("a", None, 10) == ([], False)
    assert store.counts() == StoreCounts(0, 0)


@pytest.mark.parametrize("digest", ["", "../../lock", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_only_digests_name_files(store: SessionStore, digest: str) -> None:
    with pytest.raises(SnapshotError):
        store.get(digest)
    with pytest.raises(SnapshotError):
        store.create([NewSession("a", 1, head=digest)])


def test_pages_are_newest_first(store: SessionStore, backend: Backend) -> None:
    made = []
    for n in range(7):
        backend.pass_time(n % 2)  # some in one second
        made.append(make(store))
    make(store, owner="b")
    wanted = [record.id for record in reversed(made)]
    seen: list[str] = []
    has_more = True
    while has_more:
        page, has_more = store.list("a", seen[-1] if seen else None, 3)
        seen += [record.id for record in page]
    assert seen == wanted
    assert store.list("a", None, 7)[1] is False
    for owner, after in [("a", "unknown"), ("b", wanted[0])]:
        with pytest.raises(SessionNotFoundError):
            store.list(owner, after, 3)


def test_unknown_and_deleted_sessions(store: SessionStore) -> None:
    record = make(store)
    store.delete(record.id)
    for session_id in ("unknown", record.id):
        for verb in (store.record, store.head, store.delete):
            with pytest.raises(SessionNotFoundError):
                verb(session_id)
        with pytest.raises(SessionNotFoundError):
            store.acquire(session_id, 60)


def test_expired_sessions_are_not_there(store: SessionStore, backend: Backend) -> None:
    until = store.now() + 10
    made = store.create(
        [NewSession("a", 1, snapshot=b"%d" % n, expires_at=until) for n in range(250)]
    )
    forever = make(store)
    lease, _ = store.acquire(made[0].id, 60)
    assert store.expire(500) == []
    backend.pass_time(10)
    assert store.list("a", None, 10)[0] == [forever]
    with pytest.raises(SessionNotFoundError):
        store.acquire(made[1].id, 60)
    gone = store.expire(100)
    assert len(gone) == 100
    gone += store.expire(500)
    assert set(gone) == {each.id for each in made[1:]}
    assert store.commit(lease, 1, b"its turn ends", 2, 0).version == 2
    assert store.expire(1) == [made[0].id]
    assert store.counts() == StoreCounts(1, 3)


def test_threads_share_a_store(store: SessionStore) -> None:
    """They put equal bytes and take them away again: none is removed under another's hands."""
    ids = [make(store, b"start").id for _ in range(4)]
    failures: list[Exception] = []

    def turn(session_id: str) -> None:
        try:
            for n in range(30):
                record = put(store, session_id, b"shared %d" % (n % 3), keep=0)
                assert store.get(record.head) == b"shared %d" % (n % 3)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=turn, args=[session_id]) for session_id in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert {store.head(session_id) for session_id in ids} == {31}
    assert store.counts().blob_bytes == 8

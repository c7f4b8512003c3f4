"""The journal of turns in a folder: what waits for the next start, and what ends with its turn."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cottention.engine.errors import SessionBusyError, SessionMovedError, SessionNotFoundError
from cottention.engine.sessions.store import Lease, NewSession, SqliteStore
from cottention.engine.sessions.store.journal import MAX_TRIES, Adopted, Chunk, JournaledTurn
from cottention.engine.sessions.store.protocol import Answer, Claim, Claimed

TURN = JournaledTurn("a", "0" * 16, "cmpl-1", "/v1/completions", b"{}", 7, 1, 9.5)


@contextmanager
def opened(folder: Path, model: str = "m") -> Iterator[SqliteStore]:
    """A server's store; its end is as that of one that was killed: no lease is given back."""
    with closing(SqliteStore(folder, durable=False, model=model)) as store:
        yield store


def begin(store: SqliteStore, turn: JournaledTurn = TURN) -> Lease:
    """A turn of a new session, journaled."""
    [record] = store.create([NewSession("a", 1, snapshot=b"one")])
    lease, _ = store.acquire(record.id, 60)
    store.journal.begin(lease, turn)
    return lease


def adopt(store: SqliteStore, session_id: str) -> Adopted:
    assert store.journal.waiting() == [session_id]
    adopted = store.journal.adopt(session_id, 60)
    assert adopted is not None
    return adopted


def num_rows(store: SqliteStore) -> int:
    count = "SELECT (SELECT count(*) FROM turns) + (SELECT count(*) FROM chunks)"
    return int(store._index.read(lambda db: db.execute(count).fetchone())[0])


def test_a_turn_waits_for_the_next_start_and_nothing_else_takes_its_session(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        lease = begin(store)
        chunks = [Chunk(lease, 0, [1, 2], b"a"), Chunk(lease, 1, [-3], b"b")]
        assert store.journal.append(chunks) == {lease}
        assert store.journal.waiting() == []
        holder = store.journal.holder(lease.session_id, "a")
        assert holder is not None
        assert (holder.is_mine, holder.is_alive, holder.goes_on) == (True, True, True)
    with opened(tmp_path) as store:
        assert not store.record(lease.session_id).was_interrupted
        for taken in (
            lambda: store.acquire(lease.session_id, 60),
            lambda: store.delete(lease.session_id),
        ):
            with pytest.raises(SessionBusyError):
                taken()
        adopted = adopt(store, lease.session_id)
        assert (adopted.ids, adopted.events, adopted.turn) == ((1, 2, -3), b"ab", TURN)
        assert store.journal.waiting() == []
        assert store.journal.append([Chunk(adopted.lease, 0, [4], b"c")]) == {adopted.lease}
    with opened(tmp_path) as store:
        again = adopt(store, lease.session_id)
        assert (again.ids, again.events) == ((1, 2, -3, 4), b"abc")
        store.commit(again.lease, again.lease.version, b"two", 2, 2)
        assert num_rows(store) == 0
        assert store.journal.holder(lease.session_id, "a") is None
        store.acquire(lease.session_id, 60)
        with pytest.raises(SessionNotFoundError):
            store.journal.holder(lease.session_id, "b")


@pytest.mark.parametrize("how", ["commit", "release"])
def test_a_turn_that_has_ended_waits_for_nobody(tmp_path: Path, how: str) -> None:
    with opened(tmp_path) as store:
        lease = begin(store)
        store.journal.append([Chunk(lease, 0, [1], b"a")])
        if how == "commit":
            store.commit(lease, lease.version, b"two", 2, 2)
        else:
            store.release(lease)
        assert num_rows(store) == 0
        assert store.journal.append([Chunk(lease, 1, [2], b"late")]) == set()
        with pytest.raises(SessionMovedError):
            store.journal.begin(lease, TURN)
    with opened(tmp_path) as store:
        assert store.journal.waiting() == []


def test_a_turn_without_its_client_s_wish_is_undone(tmp_path: Path) -> None:
    """As before: its session is free, and says that the turn was cut."""
    with opened(tmp_path) as store:
        [record] = store.create([NewSession("a", 1, snapshot=b"one")])
        store.acquire(record.id, 60)
    with opened(tmp_path) as store:
        assert store.journal.waiting() == []
        _, found = store.acquire(record.id, 60)
        assert found.was_interrupted


def test_a_turn_that_is_handed_over_is_adopted_once(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        lease = begin(store)
        store.journal.hand_over(lease)
        assert not store.journal.holds(lease)
        adopted = adopt(store, lease.session_id)
        assert store.journal.adopt(lease.session_id, 60) is None
        with pytest.raises(SessionMovedError):
            store.commit(lease, lease.version, b"late", 2, 2)
        store.commit(adopted.lease, adopted.lease.version, b"two", 2, 2)


def test_a_turn_that_its_server_dies_of_is_undone(tmp_path: Path) -> None:
    """Or the server could never be started again."""
    with opened(tmp_path) as store:
        lease = begin(store)
    for _ in range(MAX_TRIES):
        with opened(tmp_path) as store:
            last = adopt(store, lease.session_id).lease
    with opened(tmp_path) as store:  # one that goes on is counted anew
        assert store.journal.append([Chunk(last, 0, [1], b"late")]) != set()
        adopt(store, lease.session_id)
    for _ in range(MAX_TRIES - 1):
        with opened(tmp_path) as store:
            adopt(store, lease.session_id)
    with opened(tmp_path) as store:
        assert store.journal.adopt(lease.session_id, 60) is None
        assert num_rows(store) == 0
        _, record = store.acquire(lease.session_id, 60)
        assert record.was_interrupted


def test_a_turn_goes_on_with_its_model(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        lease = begin(store)
    with opened(tmp_path, "another") as store:
        assert store.journal.waiting() == []
        assert store.journal.adopt(lease.session_id, 60) is None
    with opened(tmp_path) as store:
        adopt(store, lease.session_id)


def test_a_key_stays_with_its_turn(tmp_path: Path) -> None:
    """Or its request would be executed again beside the turn that goes on."""
    with opened(tmp_path) as store:
        claim, other = (store.claim("a", key, b"1", 60) for key in ("k", "other"))
        assert isinstance(claim, Claim)
        lease = begin(store, replace(TURN, key="k", token=claim.token))
    with opened(tmp_path) as store:
        assert isinstance(store.claim("a", "k", b"1", 60), Claimed)
        assert isinstance(store.claim("a", "other", b"1", 60), Claim), other
        adopted = adopt(store, lease.session_id)
        answer = Answer(claim, lambda _: b"yes")
        store.commit(adopted.lease, adopted.lease.version, b"two", 2, 2, answer=answer)
        done = store.claim("a", "k", b"1", 60)
        assert isinstance(done, Claimed)
        assert done.answer == b"yes"


def test_a_key_s_time_is_not_over_before_its_turn(tmp_path: Path) -> None:
    """Or the turn's end would be refused for ever, and adopted as often."""
    with opened(tmp_path) as store:
        claim = store.claim("a", "k", b"1", 0)
        assert isinstance(claim, Claim)
        lease = begin(store, replace(TURN, key="k", token=claim.token))
        store.expire(10)
        assert isinstance(store.claim("a", "k", b"1", 0), Claimed)
        store.commit(lease, 1, b"two", 2, 2, answer=Answer(claim, lambda _: b"yes"))
        assert isinstance(store.claim("a", "k", b"1", 0), Claim)

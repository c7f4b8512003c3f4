"""The journal of turns in PostgreSQL: who may adopt one, and what a zombie may still write."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest

from cottention.engine.errors import SessionBusyError, SessionMovedError, SessionNotFoundError
from cottention.engine.sessions.store import Lease, NewSession
from cottention.engine.sessions.store.journal import MAX_TRIES, Adopted, Chunk, JournaledTurn
from cottention.engine.sessions.store.postgres import replica
from cottention.engine.sessions.store.postgres.store import PostgresStore
from cottention.engine.sessions.store.protocol import Answer, Claim, Claimed
from tests.engine.postgres import PASSWORD, Postgres
from tests.engine.sessions.store.backends import PostgresBackend
from tests.server.live import eventually

pytestmark = pytest.mark.cluster

TURN = JournaledTurn("a", "0" * 16, "cmpl-1", "/v1/completions", b"{}", 7, 1)


@pytest.fixture
def long_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody counts as dead who is only kept waiting by a busy machine."""
    monkeypatch.setattr(replica, "LIFE_SECONDS", 30.0)


@pytest.fixture
def backend(postgres: Postgres) -> PostgresBackend:
    return PostgresBackend(postgres)


@contextmanager
def opened(backend: PostgresBackend, url: str, model: str = "m") -> Iterator[PostgresStore]:
    made = PostgresStore(backend.url, password=PASSWORD, replica_url=url, model=model)
    with closing(made) as store:
        yield store


@pytest.fixture
def one(backend: PostgresBackend) -> Iterator[PostgresStore]:
    with opened(backend, "http://one") as store:
        yield store


@pytest.fixture
def two(backend: PostgresBackend) -> Iterator[PostgresStore]:
    with opened(backend, "http://two") as store:
        yield store


def begin(store: PostgresStore, turn: JournaledTurn = TURN) -> Lease:
    """A turn of a new session, journaled."""
    [record] = store.create([NewSession("a", 1, snapshot=b"one")])
    lease, _ = store.acquire(record.id, 60)
    store.journal.begin(lease, turn)
    return lease


def adopt(store: PostgresStore, lease: Lease) -> Adopted:
    eventually(lambda: lease.session_id in store.journal.waiting())
    adopted = store.journal.adopt(lease.session_id, 60)
    assert adopted is not None
    return adopted


@pytest.mark.usefixtures("long_life")
def test_a_turn_is_adopted_when_its_server_is_dead_and_by_nobody_before(
    one: PostgresStore, two: PostgresStore
) -> None:
    """Nor may another turn take its session: the turn goes on."""
    lease = begin(one)
    assert one.journal.append([Chunk(lease, 0, [1, 2], b"a"), Chunk(lease, 1, [-3], b"b")]) == {
        lease
    }
    assert two.journal.waiting() == []
    assert two.journal.adopt(lease.session_id, 60) is None
    one.close()
    with pytest.raises(SessionBusyError):
        two.acquire(lease.session_id, 60)
    adopted = adopt(two, lease)
    assert (adopted.ids, adopted.events, adopted.turn) == ((1, 2, -3), b"ab", TURN)
    assert adopted.lease.fence == lease.fence + 1
    assert not adopted.record.was_interrupted
    assert two.journal.waiting() == []
    two.journal.append([Chunk(adopted.lease, 0, [4], b"c")])
    two.commit(adopted.lease, adopted.lease.version, b"two", 2, 2)
    two.acquire(lease.session_id, 60)


def test_a_plain_turn_of_a_dead_server_is_not_waited_for(
    one: PostgresStore, two: PostgresStore
) -> None:
    """Its session is free, and says that the turn was cut."""
    [record] = one.create([NewSession("a", 1, snapshot=b"one")])
    one.acquire(record.id, 60)
    one.close()
    assert two.journal.waiting() == []
    _, found = two.acquire(record.id, 60)
    assert found.was_interrupted


def test_a_zombie_writes_nothing(one: PostgresStore, two: PostgresStore) -> None:
    """Neither chunks, which the next one would read, nor the turn's end."""
    lease = begin(one)
    one.journal.hand_over(lease)  # as if it had been stopped for too long
    adopted = adopt(two, lease)
    assert one.journal.append([Chunk(lease, 5, [9], b"late")]) == set()
    assert not one.journal.holds(lease)
    assert two.journal.holds(adopted.lease)
    with pytest.raises(SessionMovedError):
        one.commit(lease, lease.version, b"late", 9, 2)
    one.release(lease)
    two.journal.hand_over(adopted.lease)
    again = adopt(one, adopted.lease)
    assert (again.ids, again.events) == ((), b"")


@pytest.mark.parametrize("how", ["commit", "release"])
def test_a_turn_that_has_ended_is_adopted_by_nobody(
    one: PostgresStore, two: PostgresStore, backend: PostgresBackend, how: str
) -> None:
    lease = begin(one)
    one.journal.append([Chunk(lease, 0, [1], b"a")])
    if how == "commit":
        one.commit(lease, lease.version, b"two", 2, 2)
    else:
        one.release(lease)
    one.close()
    assert two.journal.waiting() == []
    assert backend.execute("SELECT 1 FROM cottention.chunks") == []
    assert backend.execute("SELECT 1 FROM cottention.turns") == []


def test_a_turn_that_its_servers_die_of_is_undone(
    one: PostgresStore, two: PostgresStore, backend: PostgresBackend
) -> None:
    """Or it would go round and end one after the other."""

    def die() -> Lease:
        backend.execute("UPDATE cottention.sessions SET lease_owner = 'dead'")
        return adopt(one, lease).lease

    lease = begin(one)
    for _ in range(MAX_TRIES):
        lease = die()
    one.journal.append([Chunk(lease, 0, [1], b"a")])  # it went on: counted anew
    for _ in range(MAX_TRIES):
        lease = die()
    one.journal.hand_over(lease)  # it lives: not counted
    lease = adopt(one, lease).lease
    for _ in range(MAX_TRIES - 1):
        lease = die()
    one.close()
    eventually(lambda: two.journal.waiting() == [])
    _, record = two.acquire(lease.session_id, 60)
    assert record.was_interrupted


def test_turns_are_adopted_by_servers_of_their_model(
    one: PostgresStore, backend: PostgresBackend
) -> None:
    lease = begin(one)
    one.journal.hand_over(lease)
    with opened(backend, "http://other", model="other") as other:
        assert other.journal.waiting() == []
        assert other.journal.adopt(lease.session_id, 60) is None
    adopt(one, lease)


@pytest.mark.usefixtures("long_life")
def test_who_has_a_session_is_told_to_its_owner_alone(
    one: PostgresStore, two: PostgresStore
) -> None:
    lease = begin(one)
    for store in (one, two):
        holder = store.journal.holder(lease.session_id, "a")
        assert holder is not None
        assert (holder.url, holder.is_mine) == ("http://one", store is one)
        assert (holder.is_alive, holder.goes_on) == (True, True)
        with pytest.raises(SessionNotFoundError):
            store.journal.holder(lease.session_id, "b")
    assert two.journal.urls() == ["http://one"]
    one.commit(lease, lease.version, b"two", 2, 2)
    assert two.journal.holder(lease.session_id, "a") is None


@pytest.mark.usefixtures("long_life")
def test_a_key_goes_with_its_turn(one: PostgresStore, two: PostgresStore) -> None:
    """Or its request would be executed again beside the turn that goes on."""
    claim = one.claim("a", "k", b"1", 60)
    assert isinstance(claim, Claim)
    lease = begin(one, replace(TURN, key="k", token=claim.token))
    one.close()
    pending = two.claim("a", "k", b"1", 60)
    assert isinstance(pending, Claimed)
    assert not pending.is_alive
    adopted = adopt(two, lease)
    pending = two.claim("a", "k", b"1", 60)
    assert isinstance(pending, Claimed)
    assert (pending.is_mine, pending.is_alive) == (True, True)
    answer = Answer(claim, lambda _: b"yes")
    two.commit(adopted.lease, adopted.lease.version, b"two", 2, 2, answer=answer)
    done = two.claim("a", "k", b"1", 60)
    assert isinstance(done, Claimed)
    assert done.answer == b"yes"


def test_a_key_s_time_is_not_over_before_its_turn(one: PostgresStore) -> None:
    """Or the turn's end would be refused for ever, and adopted as often."""
    claim = one.claim("a", "k", b"1", 0)
    assert isinstance(claim, Claim)
    lease = begin(one, replace(TURN, key="k", token=claim.token))
    one.expire(10)
    assert isinstance(one.claim("a", "k", b"1", 0), Claimed)
    one.commit(lease, 1, b"two", 2, 2, answer=Answer(claim, lambda _: b"yes"))
    assert isinstance(one.claim("a", "k", b"1", 0), Claim)


def test_a_server_that_missed_its_beats_begins_another_life(
    one: PostgresStore,
) -> None:
    """By it a turn knows that it may have been adopted meanwhile."""
    first = one.journal.life
    assert first is not None
    eventually(lambda: one.journal.is_steady)
    one._replica._last_beat -= 10  # as after SIGSTOP
    eventually(lambda: one.journal.life == first + 1)
    assert not one.journal.is_steady

"""Idempotency keys in every store: one claim, the answer with the change, what is forgotten."""

from collections.abc import Sequence

import pytest

from cottention.engine.errors import KeyReusedError, SessionMovedError
from cottention.engine.sessions.store import NewSession, SessionRecord, SessionStore
from cottention.engine.sessions.store.protocol import MAX_KEYS, Answer, Claim, Claimed
from tests.engine.sessions.store.backends import Backend

DAY = 86_400.0


def claimed(store: SessionStore, key: str = "k", owner: str = "a", request: bytes = b"1") -> Claim:
    claim = store.claim(owner, key, request, DAY)
    assert isinstance(claim, Claim)
    return claim


def told(records: Sequence[SessionRecord]) -> bytes:
    return ",".join(f"{each.position}/{each.version}" for each in records).encode()


def opened(store: SessionStore) -> str:
    [record] = store.create([NewSession("a", 1, snapshot=b"one")])
    return record.id


def test_a_key_is_claimed_once_and_then_answered(store: SessionStore) -> None:
    """Or a request that is sent twice would be executed twice."""
    claim = claimed(store)
    pending = store.claim("a", "k", b"1", DAY)
    assert isinstance(pending, Claimed)
    assert (pending.answer, pending.is_mine, pending.is_alive) == (None, True, True)
    claimed(store, owner="b")
    with pytest.raises(KeyReusedError):
        store.claim("a", "k", b"2", DAY)
    store.keep_answer(claim, b"yes")
    found = store.claim("a", "k", b"1", DAY)
    assert isinstance(found, Claimed)
    assert found.answer == b"yes"
    store.drop_claim(claim)  # an answer stays
    with pytest.raises(KeyReusedError):
        store.claim("a", "k", b"2", DAY)


def test_what_came_to_nothing_is_claimed_again_and_the_old_claim_writes_nothing(
    store: SessionStore,
) -> None:
    old = claimed(store)
    store.drop_claim(old)
    claimed(store, request=b"2")
    store.keep_answer(old, b"late")
    pending = store.claim("a", "k", b"2", DAY)
    assert isinstance(pending, Claimed)
    assert pending.answer is None


def test_an_answer_is_stored_with_the_turn_or_neither_is(store: SessionStore) -> None:
    """Or a crash between the two would let the turn happen twice."""
    session_id = opened(store)
    lease, _ = store.acquire(session_id, 60)
    claim = claimed(store)
    store.commit(lease, lease.version, b"two", 2, 4, answer=Answer(claim, told))
    assert store.claim("a", "k", b"1", DAY) == Claimed(b"2/2", *shown(store))

    lease, _ = store.acquire(session_id, 60)
    lost = claimed(store, "l")
    store.drop_claim(lost)
    with pytest.raises(SessionMovedError):
        store.commit(lease, lease.version, b"three", 3, 4, answer=Answer(lost, told))
    assert store.record(session_id).position == 2


def test_an_answer_is_stored_with_new_sessions_or_neither_is(store: SessionStore) -> None:
    new = NewSession("a", 5, snapshot=b"fork")
    claim = claimed(store)
    store.create([new, new], Answer(claim, told))
    assert store.claim("a", "k", b"1", DAY) == Claimed(b"5/1,5/1", *shown(store))
    num = store.counts().num_sessions
    lost = claimed(store, "l")
    store.drop_claim(lost)
    with pytest.raises(SessionMovedError):
        store.create([new], Answer(lost, told))
    assert store.counts().num_sessions == num


def shown(store: SessionStore) -> tuple[str | None, bool, bool]:
    """Where an answer is said to have been made."""
    found = store.claim("a", "k", b"1", DAY)
    assert isinstance(found, Claimed)
    return found.url, found.is_mine, found.is_alive


def test_keys_are_forgotten_when_their_time_is_over(backend: Backend) -> None:
    store = backend.open()
    store.keep_answer(claimed(store), b"yes")
    claimed(store, "unanswered")
    backend.pass_time(DAY + 9)
    store.expire(10)
    claimed(store, request=b"another")
    claimed(store, "unanswered", request=b"another")
    store.close()


def test_what_a_dead_server_was_answering_is_claimed_again(backend: Backend) -> None:
    """Its answers are kept; without this its key would be refused for a day."""
    store = backend.open()
    store.keep_answer(claimed(store, "done"), b"yes")
    claimed(store)
    store.close()
    store = backend.open()
    claimed(store)
    found = store.claim("a", "done", b"1", DAY)
    assert isinstance(found, Claimed)
    assert found.answer == b"yes"
    store.close()


def test_the_keys_of_an_owner_are_bounded(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or one client could fill the disk with them."""
    assert MAX_KEYS > 1000
    for module in ("answers", "postgres.answers"):
        monkeypatch.setattr(f"cottention.engine.sessions.store.{module}.MAX_KEYS", 3)
    for n in range(6):
        store.keep_answer(claimed(store, f"k{n}"), b"yes")
    assert isinstance(store.claim("a", "k5", b"1", DAY), Claimed)
    claimed(store, "k0")

"""What a server tells of turns that it journals: when it may, and when never again."""

import asyncio
import threading
from collections.abc import Iterable
from typing import Any

import pytest

from cottention.engine.errors import SessionMovedError, StoreUnreachableError
from cottention.engine.outputs import Output
from cottention.engine.sessions.store import Lease
from cottention.engine.sessions.store.journal import Chunk, JournaledTurn
from cottention.server.generation.output_stream import OutputStream
from cottention.server.sessions.journal import JournalWriter, TurnJournal

LEASE = Lease("s", 1, 1)
TURN = JournaledTurn("a", "0" * 16, "cmpl-1", "/v1/completions", b"{}", 7, 1)


class FakeJournal:
    """Keeps chunks in a list, may be away, and may say that the lease is another's."""

    is_steady = True

    def __init__(self) -> None:
        self.life: int | None = 1
        self.chunks: list[Chunk] = []
        self.is_held = True
        self.is_away = False
        self.may_append = threading.Event()
        self.may_append.set()

    def begin(self, lease: Lease, turn: JournaledTurn) -> None:
        """As SessionJournal."""

    def append(self, chunks: Iterable[Chunk]) -> set[Lease]:
        self.may_append.wait()
        if self.is_away:
            raise StoreUnreachableError("away")
        self.chunks += chunks
        return {LEASE} if self.is_held else set()

    def holds(self, lease: Lease) -> bool:  # noqa: ARG002
        return self.is_held

    @property
    def told(self) -> bytes:
        return b"".join(chunk.events for chunk in self.chunks)


async def begun(journal: Any, *, gates: bool) -> TurnJournal:
    return await JournalWriter(journal, gates=gates).begin(LEASE, TURN, lambda: None)


async def soon(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_events_wait_for_the_journal_only_where_it_gates_them() -> None:
    """Where others may compute something else, what was told must be known to them."""
    journal = FakeJournal()

    async def run() -> None:
        journal.may_append.clear()
        told = await begun(journal, gates=False)
        await told.tell([1], b"at once")
        told.close()
        gated = await begun(journal, gates=True)
        telling = asyncio.create_task(gated.tell([1], b"later"))
        done, _ = await asyncio.wait([telling], timeout=0.3)
        assert not done
        journal.may_append.set()
        await telling
        assert b"later" in journal.told
        gated.close()

    asyncio.run(run())


def test_parts_are_stored_once_and_in_order_though_the_store_is_away() -> None:
    journal = FakeJournal()

    async def run() -> None:
        told = await begun(journal, gates=False)
        journal.is_away = True
        for n in range(50):
            await told.tell([n], b"%d." % n)
            await asyncio.sleep(0.01 if n % 10 == 0 else 0)
        journal.is_away = False
        await told.flush()
        told.close()

    asyncio.run(run())
    assert journal.told == b"".join(b"%d." % n for n in range(50))
    assert [each for chunk in journal.chunks for each in chunk.ids] == [*range(50)]
    assert [chunk.n for chunk in journal.chunks] == [*range(len(journal.chunks))]


def test_a_server_that_may_be_dead_tells_nothing_until_it_knows_better() -> None:
    """Another may have adopted the turn: then never again."""
    journal = FakeJournal()

    async def run() -> None:
        told = await begun(journal, gates=False)
        await told.tell([1], b"a")
        journal.life = None
        telling = asyncio.create_task(told.tell([2], b"b"))
        done, _ = await asyncio.wait([telling], timeout=0.5)
        assert not done
        journal.life = 2
        await telling
        journal.life, journal.is_held = 3, False
        with pytest.raises(SessionMovedError):
            await told.tell([3], b"c")
        assert told.is_lost
        told.close()

    asyncio.run(run())


async def tell_on(told: TurnJournal) -> None:
    for n in range(1000):
        await told.tell([n], b"x")
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("gates", [False, True])
def test_a_write_that_finds_the_turn_gone_ends_it(gates: bool) -> None:
    journal = FakeJournal()

    async def run() -> None:
        told = await begun(journal, gates=gates)
        journal.is_held = False
        with pytest.raises(SessionMovedError):
            await tell_on(told)
        told.close()

    asyncio.run(run())


def test_a_turn_that_is_handed_over_tells_no_more_and_stores_the_rest() -> None:
    journal = FakeJournal()

    async def run() -> None:
        told = await begun(journal, gates=False)
        await told.tell([1], b"a")
        told.leave()
        with pytest.raises(SessionMovedError):
            await told.tell([2], b"b")
        told.is_leaving = False
        await told.flush()
        told.close()

    asyncio.run(run())
    assert journal.told == b"ab"


def test_outputs_that_are_kept_apart_are_read_one_by_one() -> None:
    """Merged as they happen to come, the same ids would make other events the second time."""

    async def run() -> None:
        stream = OutputStream(
            1, lambda _: None, lambda _: None, keeps_token_ids=True, keeps_apart=True
        )
        for n in range(3):
            stream.deliver(0, Output("r", 0, str(n), (n,)))
        for n in range(3):
            assert stream.has_more
            [delta] = (await stream.take()).values()
            assert delta.tokens is not None
            assert (delta.text, delta.tokens.ids) == (str(n), [n])
        assert await stream.take(0.01) == {}

    asyncio.run(run())

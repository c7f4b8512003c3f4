"""What bodies take together is bounded and shared, and large ones are processed in turns."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator

import pytest

from cottention.engine.errors import ConfigurationError
from cottention.server.config import ServerConfig
from cottention.server.http.body_memory import LARGE_BYTES
from cottention.server.http.shares import FairTurns, Shares
from tests.server.fake_engine import FakeEngine, FakeTokenizer
from tests.server.limits.test_api_keys import bearer
from tests.server.live import PATIENCE, Live, eventually, serving

ONE, TWO = "first-key", "second-key"


def test_shares_leave_some_to_those_who_have_none() -> None:
    shares = Shares(100)
    assert shares.take("a", 30)
    assert shares.take("a", 20)
    assert not shares.take("a", 1)
    assert shares.take("b", 25)
    assert not shares.take("b", 1)
    assert (shares.num_held, shares.held_by("a")) == (75, 50)
    shares.give_back("a", 50)
    assert shares.take("c", 75)
    assert not Shares(10).take("a", 11)
    assert Shares(10).take("a", 10)


def test_who_waits_has_turns_by_owner_whoever_asked_first() -> None:
    async def order() -> list[str]:
        turns, done = FairTurns(1), []

        async def work(name: str) -> None:
            async with turns.turn(name[0]):
                done.append(name)
                await asyncio.sleep(0)

        await asyncio.gather(*map(work, ("a1", "a2", "a3", "a4", "b1", "c1", "b2")))
        return done

    assert asyncio.run(order()) == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]


def test_who_leaves_while_it_waits_or_as_its_turn_comes_takes_no_turn() -> None:
    async def run() -> None:
        turns = FairTurns(1)

        async def work() -> None:
            async with turns.turn("a"):
                pass

        async with turns.turn("a"):
            waiting, next_one = asyncio.create_task(work()), asyncio.create_task(work())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.sleep(0)
        next_one.cancel()  # the turn has been given to it, and it has not noticed
        async with asyncio.timeout(PATIENCE):
            await work()

    asyncio.run(run())


@contextlib.contextmanager
def announced(live: Live, key: str, num_bytes: int) -> Iterator[socket.socket]:
    """A request of which the head has come, and nothing of its body."""
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE) as sock:
        head = f"POST /tokenize HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        sock.sendall(f"{head}Content-Length: {num_bytes}\r\nExpect: 100-continue\r\n\r\n".encode())
        assert sock.recv(1000).startswith(b"HTTP/1.1 100 ")
        yield sock


def status(live: Live, key: str, num_bytes: int) -> int:
    body = json.dumps({"prompt": "x" * (num_bytes - 14)})
    assert len(body) == num_bytes
    headers = bearer(key) if key else {}
    return live.client.post("/tokenize", content=body, headers=headers).status_code


def test_bodies_of_one_key_leave_room_for_another_s() -> None:
    settings = {"max_body_bytes": 50_000, "max_received_bytes": 100_000}
    with serving(api_key=(ONE, TWO), **settings) as live:
        with announced(live, ONE, 30_000), announced(live, ONE, 20_000):
            eventually(lambda: status(live, ONE, 15), equals=429)
            assert status(live, TWO, 50_000) == 200
        eventually(lambda: status(live, ONE, 50_000), equals=200)


def test_a_request_s_body_counts_until_its_end() -> None:
    with serving(max_body_bytes=10_000, max_received_bytes=10_000) as live:
        live.engine.may_step.clear()
        with live.connect(prompt="x" * 6000):
            eventually(lambda: live.engine.running)
            eventually(lambda: status(live, "", 6000), equals=429)
            live.engine.may_step.set()
        eventually(lambda: status(live, "", 6000), equals=200)


class CountingTokenizer(FakeTokenizer):
    """Waits at each text until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []
        self.may_go_on = threading.Event()

    def encode(self, text: str) -> list[int]:
        if len(text) > 100:
            self.lengths.append(len(text))
            assert self.may_go_on.wait(PATIENCE)
        return super().encode(text)


def test_large_bodies_are_processed_one_at_a_time_and_small_ones_beside_them() -> None:
    engine = FakeEngine()
    engine.tokenizer = tokenizer = CountingTokenizer()
    small = 20_000
    with serving(engine, api_key=(ONE, TWO)) as live, contextlib.ExitStack() as stack:
        live.client.headers.update(bearer(ONE))
        for _ in range(3):
            stack.enter_context(live.connect(prompt="x" * LARGE_BYTES, max_tokens=1))
        eventually(lambda: tokenizer.lengths, equals=[LARGE_BYTES])
        for _ in range(3):
            stack.enter_context(live.connect(prompt="x" * small, max_tokens=1))
        eventually(lambda: tokenizer.lengths, equals=[LARGE_BYTES, small, small])
        assert live.complete(prompt="x", max_tokens=1).status_code == 200
        tokenizer.may_go_on.set()
        eventually(lambda: len(tokenizer.lengths), equals=6)
        eventually(lambda: not live.engine.running)


def test_one_body_must_fit() -> None:
    with pytest.raises(ConfigurationError, match="--max-body-bytes"):
        ServerConfig(max_body_bytes=100, max_received_bytes=99)

"""Steps on their way to the event loop: what wakes it, what waits for it to look, and no longer."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from cottention.engine.outputs import FinishReason, Output
from cottention.server.generation import dispatch
from cottention.server.generation.dispatch import Handover

PAUSE = "the engine's thread gave way"


class Handed:
    """A handover whose clock the test has, and which keeps what happened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.happened: list[Any] = []
        monkeypatch.setattr(dispatch, "time", self)
        self._loop = asyncio.get_running_loop()
        self.made = Handover(self, self.dispatch)  # type: ignore[arg-type]  # is the loop as well

    def monotonic(self) -> float:
        return self.now

    def sleep(self, _: float) -> None:
        self.happened.append(PAUSE)

    def dispatch(self, steps: Any) -> None:
        self.happened.append([output.text for outputs, _ in steps for output in outputs])

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        self.happened.append("woken")
        callback()

    def call_later(self, seconds: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        assert seconds == dispatch.HOLD_SECONDS
        self.look = callback
        return self._loop.call_later(3600, callback)

    def step(
        self, text: str, seconds: float = 0.0001, reason: FinishReason | None = None
    ) -> list[Any]:
        """What happens at a step of this length."""
        self.now += seconds
        before = len(self.happened)
        self.made.post([Output("r", 0, text, (1,), reason)])
        return self.happened[before:]


def run_with(monkeypatch: pytest.MonkeyPatch, test: Callable[[Handed], None]) -> None:
    async def run() -> None:
        test(Handed(monkeypatch))

    asyncio.run(run())


def test_fast_steps_wait_until_the_loop_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    def test(handed: Handed) -> None:
        assert handed.step("a", seconds=60) == ["woken", ["a"], PAUSE]
        assert handed.step("b") == ["woken", ["b"]]  # how fast steps come is not known before
        assert [handed.step(each) for each in "cde"] == [[], [], []]
        handed.look()
        assert handed.happened[-1] == ["c", "d", "e"]
        assert handed.step("f") == []
        handed.look()
        handed.look()  # nothing came
        assert handed.step("g") == ["woken", ["g"]]

    run_with(monkeypatch, test)


def test_slow_steps_wake_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def test(handed: Handed) -> None:
        handed.step("a", seconds=60)
        assert [handed.step(each, dispatch.HOLD_SECONDS) for each in "bc"] == [
            ["woken", ["b"]],
            ["woken", ["c"]],
        ]

    run_with(monkeypatch, test)


def test_first_and_last_outputs_wake_the_loop_with_all_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def test(handed: Handed) -> None:
        handed.step("a", seconds=60)
        handed.step("b")
        assert handed.step("c") == []
        handed.made.post([Output("other", 0, "first", (1,))])
        assert handed.happened[-3:] == ["woken", ["c", "first"], PAUSE]
        handed.step("d")
        assert handed.step("e", reason=FinishReason.STOP) == ["woken", ["d", "e"]]
        assert handed.step("again")[-1] == PAUSE  # the id is another request's now

    run_with(monkeypatch, test)


def test_each_step_arrives_once_and_in_order() -> None:
    """Posted by another thread as fast as it can, beside a loop that looks all the time."""
    arrived: list[str] = []

    async def run() -> None:
        made = Handover(
            asyncio.get_running_loop(),
            lambda steps: arrived.extend(each.text for outputs, _ in steps for each in outputs),
        )

        def post() -> None:
            for n in range(5000):
                made.post([Output("r", 0, str(n), (1,))])

        thread = threading.Thread(target=post)
        thread.start()
        async with asyncio.timeout(60):
            while len(arrived) < 5000:
                await asyncio.sleep(0)
        thread.join()

    asyncio.run(run())
    assert arrived == [str(n) for n in range(5000)]

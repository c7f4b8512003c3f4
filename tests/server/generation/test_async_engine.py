"""Readings and the bridge by themselves: one post per step, merging, closing."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from cottention.engine.errors import EngineStoppedError
from cottention.engine.outputs import FinishReason, Output
from cottention.engine.sampling_params import SamplingParams
from cottention.server.generation.admission import AdmissionQueue
from cottention.server.generation.async_engine import AsyncEngine
from cottention.server.generation.output_stream import OutputStream, OutputStreamClosed
from cottention.server.generation.request import QUICK_IDS, GenerationRequest, OutputOptions
from cottention.server.schemas.sampling import StreamOptions
from tests.server.fake_engine import FakeEngine


class HandWorker:
    """A worker whose steps the test makes itself."""

    is_alive = True

    def __init__(self, deliver: Callable[[list[Output]], None], _: Any) -> None:
        self.deliver = deliver
        self.cancelled: list[str] = []
        self.submitted: list[str] = []

    def start(self) -> None:
        pass

    def submit(self, _: Any, __: Any, *, request_id: str, **more: Any) -> None:
        assert more == {"priority": 3, "start": None, "cache_scope": ""}
        self.submitted.append(request_id)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)


async def until(condition: Callable[[], object]) -> None:
    """Wait for what another thread or task does."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def bridge() -> AsyncEngine:
    made = AsyncEngine(FakeEngine(), HandWorker, AdmissionQueue(8, 10**6), 100)  # type: ignore[arg-type]
    made.start()
    return made


def order(*prompts: list[int]) -> GenerationRequest:
    return GenerationRequest(
        prompts=list(prompts),
        echoes=[],
        params=SamplingParams(),
        details=OutputOptions(),
        num_choices=1,
        is_stream=False,
        stream_options=StreamOptions.model_validate({}),
        priority=3,
        request_id=None,
    )


def test_unread_outputs_are_one_piece_per_choice() -> None:
    async def run() -> None:
        reading = OutputStream(2, print, print)
        for step in range(1000):
            reading.deliver(step % 2, Output("r", 0, "ab"[step % 2], (1,)))
        reading.deliver(1, Output("r", 0, "!", (2, 3), FinishReason.STOP))
        pieces = await reading.take()
        assert {n: (p.text, p.finish_reason) for n, p in pieces.items()} == {
            0: ("a" * 500, None),
            1: ("b" * 500 + "!", FinishReason.STOP),
        }
        assert reading.num_generated == 1002
        assert reading.has_more
        assert await reading.take(idle_seconds=0.001) == {}

    asyncio.run(run())


def test_a_step_is_posted_once_however_many_it_feeds() -> None:
    async def run() -> None:
        made = bridge()
        worker: Any = made._worker
        readings = [await made.open("r", order([1], [2])) for _ in range(3)]
        posts: list[object] = []
        post = made._loop.call_soon_threadsafe
        made._loop.call_soon_threadsafe = lambda *a: (posts.append(a), post(*a))  # type: ignore
        worker.deliver([Output(part, 0, part, (1,)) for part in [*worker.submitted, "unknown"]])
        assert len(posts) == 1
        for n, reading in enumerate(readings):
            pieces = await reading.take()
            assert [piece.text for piece in pieces.values()] == [f"r-{n}-0", f"r-{n}-1"]

    asyncio.run(run())


def test_closing_cancels_once_and_wakes_whoever_waits() -> None:
    async def run() -> None:
        made = bridge()
        worker: Any = made._worker
        reading = await made.open("r", order([1], [2]))
        waiting = asyncio.create_task(reading.take())
        await asyncio.sleep(0)
        reading.close()
        reading.close()
        with pytest.raises(OutputStreamClosed):
            await waiting
        assert worker.cancelled == ["r-0-0", "r-0-1"]
        await made.wait_idle()

    asyncio.run(run())


def test_a_finished_reading_cancels_nothing() -> None:
    async def run() -> None:
        made = bridge()
        worker: Any = made._worker
        reading = await made.open("r", order([1]))
        worker.deliver([Output("r-0-0", 0, "x", (1,), FinishReason.STOP)])
        await reading.take()
        assert not reading.has_more
        reading.close()
        assert worker.cancelled == []

    asyncio.run(run())


def test_nothing_is_taken_before_the_start_or_while_draining() -> None:
    async def run() -> None:
        made = AsyncEngine(FakeEngine(), HandWorker, AdmissionQueue(8, 10**6), 100)  # type: ignore[arg-type]
        with pytest.raises(EngineStoppedError, match="starting"):
            await made.open("r", order([1]))
        made.start()
        made.drain()
        with pytest.raises(EngineStoppedError, match="shutting down"):
            await made.open("r", order([1]))

    asyncio.run(run())


def test_outputs_after_the_loop_has_closed_are_dropped() -> None:
    async def run() -> AsyncEngine:
        return bridge()

    made: Any = asyncio.run(run())
    made._worker.deliver([Output("r", 0, "x", (1,))])
    made._on_death(RuntimeError("late"))


def test_long_prompts_are_handed_in_beside_the_loop() -> None:
    async def run() -> None:
        made = bridge()
        worker: Any = made._worker
        submit, threads = worker.submit, []

        def submitting(*given: Any, **named: Any) -> None:
            threads.append(threading.current_thread())
            submit(*given, **named)

        worker.submit = submitting
        await made.open("r", order([1] * QUICK_IDS))
        await made.open("r", order([1] * QUICK_IDS, [1]))
        assert [each is threading.main_thread() for each in threads] == [True, False, False]

    asyncio.run(run())


def test_who_leaves_while_prompts_are_handed_in_leaves_nothing_behind() -> None:
    async def run() -> None:
        made = bridge()
        worker: Any = made._worker
        submit, may_go = worker.submit, threading.Event()
        threads: list[threading.Thread] = []

        def submitting(*given: Any, **named: Any) -> None:
            threads.append(threading.current_thread())
            may_go.wait(60)
            submit(*given, **named)

        worker.submit = submitting
        opening = asyncio.create_task(made.open("r", order([1] * QUICK_IDS, [2])))
        await until(lambda: threads)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        may_go.set()
        await until(lambda: len(worker.cancelled) == 4)  # by whoever left, and once handed in
        assert set(worker.submitted) == {"r-0-0", "r-0-1"}
        assert worker.cancelled[-2:] == ["r-0-0", "r-0-1"]

    asyncio.run(run())

"""Output streams and the AsyncEngine by themselves: one post per step, merging, closing."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from cottention.engine.errors import EngineStoppedError
from cottention.engine.outputs import FinishReason, Output
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.scheduling.client import Client
from cottention.server.generation.admission import AdmissionQueue
from cottention.server.generation.async_engine import AsyncEngine
from cottention.server.generation.output_stream import OutputStream, OutputStreamClosed
from cottention.server.generation.request import MAX_INLINE_TOKENS, GenerationRequest, OutputOptions
from tests.server.fake_engine import FakeEngine


class HandWorker:
    """A worker whose steps the test makes itself."""

    is_alive = True

    def __init__(self, deliver: Callable[[list[Output]], None], _: Any) -> None:
        self.deliver = deliver
        self.cancelled: list[str] = []
        self.reasons: list[FinishReason] = []
        self.submitted: list[str] = []

    def start(self) -> None:
        pass

    def submit(self, _: Any, __: Any, *, request_id: str, **more: Any) -> None:
        assert more == {"priority": 3, "start": None, "cache": None, "client": Client()}
        self.submitted.append(request_id)

    def cancel(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        self.cancelled.append(request_id)
        self.reasons.append(reason)


async def until(condition: Callable[[], object]) -> None:
    """Wait for what another thread or task does."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def engine() -> AsyncEngine:
    made = AsyncEngine(FakeEngine(), HandWorker, AdmissionQueue(8, 10**6), 100)  # type: ignore[arg-type]
    made.start()
    return made


def request(*prompts: list[int]) -> GenerationRequest:
    return GenerationRequest(list(prompts), SamplingParams(), OutputOptions(), [], priority=3)


def test_unread_outputs_are_one_delta_per_choice() -> None:
    async def run() -> None:
        stream = OutputStream(2, print, print)
        for step in range(1000):
            stream.deliver(step % 2, Output("r", 0, "ab"[step % 2], (1,)))
        stream.deliver(1, Output("r", 0, "!", (2, 3), FinishReason.STOP))
        deltas = await stream.take()
        assert {n: (p.text, p.finish_reason) for n, p in deltas.items()} == {
            0: ("a" * 500, None),
            1: ("b" * 500 + "!", FinishReason.STOP),
        }
        assert stream.num_generated == 1002
        assert stream.has_more
        assert await stream.take(idle_seconds=0.001) == {}

    asyncio.run(run())


def test_a_step_is_posted_once_however_many_it_feeds() -> None:
    async def run() -> None:
        made = engine()
        worker: Any = made._worker
        streams = [await made.generate("r", request([1], [2])) for _ in range(3)]
        posts: list[object] = []
        post = made._loop.call_soon_threadsafe
        made._loop.call_soon_threadsafe = lambda *a: (posts.append(a), post(*a))  # type: ignore
        worker.deliver([Output(part, 0, part, (1,)) for part in [*worker.submitted, "unknown"]])
        assert len(posts) == 1
        for n, stream in enumerate(streams):
            deltas = await stream.take()
            assert [delta.text for delta in deltas.values()] == [f"r-{n}-0", f"r-{n}-1"]

    asyncio.run(run())


def test_closing_cancels_once_and_wakes_whoever_waits() -> None:
    async def run() -> None:
        made = engine()
        worker: Any = made._worker
        stream = await made.generate("r", request([1], [2]))
        waiting = asyncio.create_task(stream.take())
        await asyncio.sleep(0)
        stream.close()
        stream.close()
        with pytest.raises(OutputStreamClosed):
            await waiting
        assert worker.cancelled == ["r-0-0", "r-0-1"]
        await made.wait_idle()

    asyncio.run(run())


def test_a_finished_stream_cancels_nothing() -> None:
    async def run() -> None:
        made = engine()
        worker: Any = made._worker
        stream = await made.generate("r", request([1]))
        worker.deliver([Output("r-0-0", 0, "x", (1,), FinishReason.STOP)])
        await stream.take()
        assert not stream.has_more
        stream.close()
        assert worker.cancelled == []

    asyncio.run(run())


def test_nothing_is_taken_before_the_start_or_while_draining() -> None:
    async def run() -> None:
        made = AsyncEngine(FakeEngine(), HandWorker, AdmissionQueue(8, 10**6), 100)  # type: ignore[arg-type]
        with pytest.raises(EngineStoppedError, match="starting"):
            await made.generate("r", request([1]))
        made.start()
        made.drain()
        with pytest.raises(EngineStoppedError, match="shutting down"):
            await made.generate("r", request([1]))

    asyncio.run(run())


def test_outputs_after_the_loop_has_closed_are_dropped() -> None:
    async def run() -> AsyncEngine:
        return engine()

    made: Any = asyncio.run(run())
    made._worker.deliver([Output("r", 0, "x", (1,))])
    made._on_death(RuntimeError("late"))


def test_long_prompts_are_handed_in_beside_the_loop() -> None:
    async def run() -> None:
        made = engine()
        worker: Any = made._worker
        submit, threads = worker.submit, []

        def submitting(*given: Any, **named: Any) -> None:
            threads.append(threading.current_thread())
            submit(*given, **named)

        worker.submit = submitting
        await made.generate("r", request([1] * MAX_INLINE_TOKENS))
        await made.generate("r", request([1] * MAX_INLINE_TOKENS, [1]))
        assert [each is threading.main_thread() for each in threads] == [True, False, False]

    asyncio.run(run())


def test_who_leaves_while_prompts_are_handed_in_leaves_nothing_behind() -> None:
    async def run() -> None:
        made = engine()
        worker: Any = made._worker
        submit, may_go = worker.submit, threading.Event()
        threads: list[threading.Thread] = []

        def submitting(*given: Any, **named: Any) -> None:
            threads.append(threading.current_thread())
            may_go.wait(60)
            submit(*given, **named)

        worker.submit = submitting
        opening = asyncio.create_task(made.generate("r", request([1] * MAX_INLINE_TOKENS, [2])))
        await until(lambda: threads)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        may_go.set()
        await until(lambda: len(worker.cancelled) == 4)  # by whoever left, and once handed in
        assert set(worker.submitted) == {"r-0-0", "r-0-1"}
        assert worker.cancelled[-2:] == ["r-0-0", "r-0-1"]

    asyncio.run(run())

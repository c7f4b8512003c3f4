"""What ends a request holds from its arrival: while it is tokenized and submitted, and after.

Tokenizer and submission are held by the test. A lost deadline, disconnect or stop would leave a
request running that nobody waits for, or an answer that comes long after its time.
"""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cottention.engine.config import EngineConfig
from cottention.engine.engine import Engine
from cottention.engine.outputs import FinishReason
from cottention.server.api.generate import MAX_INLINE_BYTES
from cottention.server.generation.deadline import before_deadline, timeout_of
from cottention.server.generation.request import MAX_INLINE_TOKENS
from cottention.server.http.errors import ApiError
from tests.server.fake_engine import FakeEngine
from tests.server.live import PATIENCE, Live, eventually, serving

LONG_TEXT = "x" * (MAX_INLINE_BYTES + 1)
LONG_IDS = [70] * (MAX_INLINE_TOKENS + 1)
ENDLESS = {"max_tokens": 1_000_000, "ignore_eos": True}


class Gate:
    """Calls of a method stop here until they may go on."""

    def __init__(self, owner: Any, name: str, patch: pytest.MonkeyPatch) -> None:
        self.num_reached = 0
        self._may_go = threading.Event()
        method = getattr(owner, name)

        def held(*args: Any, **named: Any) -> Any:
            self.num_reached += 1
            assert self._may_go.wait(PATIENCE)
            return method(*args, **named)

        patch.setattr(owner, name, held)

    def open(self) -> None:
        self._may_go.set()


@pytest.fixture(params=["fake", "real"])
def engine(request: pytest.FixtureRequest, gptj_folder: Path) -> Any:
    if request.param == "fake":
        return FakeEngine(step_seconds=0.001)
    return Engine(gptj_folder, EngineConfig(max_slots=4))


@contextlib.contextmanager
def tokenizing(
    engine: Any, patch: pytest.MonkeyPatch, **settings: Any
) -> Iterator[tuple[Live, Gate]]:
    """A server whose tokenizer is held; at the end no work is left of what was sent to it."""
    with serving(engine, **settings) as live:
        gate = Gate(engine.tokenizer, "encode", patch)
        try:
            yield live, gate
        finally:
            gate.open()
        nothing_is_left(live)


@contextlib.contextmanager
def submitting(
    engine: Any, patch: pytest.MonkeyPatch, **settings: Any
) -> Iterator[tuple[Live, Gate]]:
    """A server that is held when it submits a prompt to the engine."""
    with serving(engine, **settings) as live:
        gate = Gate(live.async_engine._worker, "submit", patch)
        try:
            yield live, gate
        finally:
            gate.open()
        nothing_is_left(live)


def nothing_is_left(live: Live) -> None:
    queue, stats = live.async_engine.admission_queue, live.engine.stats
    eventually(lambda: (queue.num_requests, queue.num_tokens), equals=(0, 0))
    eventually(lambda: not live.async_engine.streams)
    eventually(lambda: stats().num_running + stats().num_waiting, equals=0)
    eventually(lambda: stats().num_free_slots == stats().num_slots)


def code_of(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_deadline_while_a_prompt_is_tokenized(
    engine: Any, is_stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer comes at the deadline; the thread keeps its place in the queue until its end."""
    with tokenizing(engine, monkeypatch) as (live, gate):
        body = {"prompt": LONG_TEXT, "timeout": 1.0, "stream": is_stream} | ENDLESS
        assert code_of(live.complete(**body)) == (504, "timeout")
        assert gate.num_reached == 1
        assert live.async_engine.admission_queue.num_requests == 1
    assert engine.stats().num_prompt_tokens == 0


def test_the_server_s_limit_while_a_prompt_is_tokenized(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a completion with a longer timeout, of a new session and of a session that reads."""
    with (
        tokenizing(engine, monkeypatch, max_request_seconds=1.0) as (live, gate),
        ThreadPoolExecutor() as pool,
    ):
        name = live.opened()
        answers = [pool.submit(live.complete, prompt=LONG_TEXT, timeout=600)]
        for path in ("", f"/{name}/append"):
            url = f"/v1/sessions{path}"
            answers.append(pool.submit(live.client.post, url, json={"prompt": "x"}))
        assert [code_of(each.result()) for each in answers] == [(504, "timeout")] * 3
        assert gate.num_reached == 3


@pytest.mark.parametrize("num_prompts", [1, 3])
def test_a_deadline_while_prompts_are_submitted(
    engine: Any, num_prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timer fires before the engine knows the prompts, and never again."""
    with submitting(engine, monkeypatch) as (live, gate), ThreadPoolExecutor() as pool:
        body = {"prompt": [LONG_IDS, *[[71]] * (num_prompts - 1)], "timeout": 1.0} | ENDLESS
        answer = pool.submit(live.complete, **body)
        eventually(lambda: gate.num_reached, equals=1)
        (stream,) = live.async_engine.streams
        eventually(lambda: stream.cancel_reason, equals=FinishReason.TIMEOUT)
        gate.open()
        assert code_of(answer.result()) == (504, "timeout")


def test_a_stream_whose_deadline_passes_while_it_is_submitted_ends_with_it(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with submitting(engine, monkeypatch) as (live, gate), ThreadPoolExecutor() as pool:
        body = {"prompt": LONG_IDS, "timeout": 1.0} | ENDLESS
        events = pool.submit(live.events, **body)
        eventually(lambda: gate.num_reached, equals=1)
        (stream,) = live.async_engine.streams
        eventually(lambda: stream.cancel_reason, equals=FinishReason.TIMEOUT)
        gate.open()
        *_, last, done = events.result()
        assert (last["choices"][0]["finish_reason"], done) == ("timeout", "[DONE]")


@pytest.mark.parametrize("prompt", [LONG_TEXT, LONG_IDS], ids=["text", "ids"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_that_has_passed_before_anything_was_done(
    engine: Any, prompt: Any, stream: bool
) -> None:
    with serving(engine) as live:
        body = {"prompt": prompt, "timeout": 1e-6, "stream": stream} | ENDLESS
        assert code_of(live.complete(**body)) == (504, "timeout")
        nothing_is_left(live)


def test_a_deadline_that_passes_at_once_ends_a_short_prompt(engine: Any) -> None:
    """An engine may be faster than a turn of the event loop, which is when time passes for it."""
    with serving(engine) as live:
        response = live.complete(prompt="x", timeout=1e-6, **ENDLESS)
        if response.status_code != 504:
            assert response.json()["choices"][0]["finish_reason"] == "timeout"
        nothing_is_left(live)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_prompt_is_tokenized(
    engine: Any, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tokenizing(engine, monkeypatch) as (live, gate):
        with live.connect(prompt=LONG_TEXT, stream=stream, **ENDLESS):
            eventually(lambda: gate.num_reached, equals=1)
        eventually(lambda: not live.server.server_state.tasks)  # its task ends before the thread
    assert engine.stats().num_prompt_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_prompt_is_submitted(
    engine: Any, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with submitting(engine, monkeypatch) as (live, gate):
        body = {"prompt": LONG_IDS, "stream": stream} | ENDLESS
        with live.connect(**body):
            eventually(lambda: gate.num_reached, equals=1)
        gate.open()


def stop(live: Live) -> None:
    """As a server does whose time to drain is over."""
    live.loop_call(live.async_engine.drain)
    live.loop_call(live.async_engine.cancel_all)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/sessions"])
def test_a_stop_while_a_prompt_is_tokenized(
    engine: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tokenizing(engine, monkeypatch) as (live, gate), ThreadPoolExecutor() as pool:
        answer = pool.submit(live.client.post, path, json={"prompt": LONG_TEXT})
        eventually(lambda: gate.num_reached, equals=1)
        stop(live)
        gate.open()
        assert code_of(answer.result()) == (503, "unavailable")


def test_a_stop_while_prompts_are_submitted(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is known to the engine, the other is not yet."""
    with submitting(engine, monkeypatch) as (live, gate), ThreadPoolExecutor() as pool:
        answer = pool.submit(live.complete, prompt=[LONG_IDS, [71]], **ENDLESS)
        eventually(lambda: gate.num_reached, equals=1)
        stop(live)
        gate.open()
        assert code_of(answer.result()) == (503, "unavailable")


@pytest.mark.parametrize("verb", ["append", "fork"])
def test_the_wait_for_a_session_ends_at_the_server_s_limit(verb: str) -> None:
    with serving(max_request_seconds=1.0) as live:
        name = live.opened("hello")
        live.engine.may_step.clear()
        with live.connect(session_id=name, prompt="x"):
            eventually(lambda: live.engine.running)
            body = {"on_conflict": "wait"} | ({"prompt": "y"} if verb == "append" else {})
            response = live.client.post(f"/v1/sessions/{name}/{verb}", json=body)
            assert code_of(response) == (504, "timeout")
        live.engine.may_step.set()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (2, 2.0),
        (0.5, 0.5),
        *((each, None) for each in (None, 0, -1, "5", True, [], float("nan"), float("inf"))),
        (10**400, None),
    ],
)
def test_the_timeout_of_a_body_that_is_not_validated(given: Any, expected: float | None) -> None:
    """What is none is refused later, by name."""
    assert timeout_of({"timeout": given}) == expected
    assert timeout_of({}) is None


def test_without_a_deadline_work_takes_its_time() -> None:
    async def run() -> None:
        assert await before_deadline(None, asyncio.sleep(0.01, "done")) == "done"
        with pytest.raises(ApiError) as caught:
            await before_deadline(asyncio.get_running_loop().time(), asyncio.sleep(60))
        assert caught.value.status == 504

    asyncio.run(run())

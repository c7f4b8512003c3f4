"""Who is let in: the line's bounds and rate, by themselves and at a live server; deadlines."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from cottention.server.generation.admission import MAX_RETRY_SECONDS, AdmissionQueue
from cottention.server.http.errors import RETRY_AFTER_SECONDS, ApiError
from tests.server.live import Live, eventually, serving


class Clock:
    """Time that a test moves itself."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def refused(line: AdmissionQueue, num_requests: int, num_tokens: int) -> int:
    """The Retry-After of a refusal."""
    with pytest.raises(ApiError) as caught:
        line.enter(num_requests, num_tokens)
    assert caught.value.status == 429
    assert caught.value.headers
    return int(caught.value.headers["Retry-After"])


def test_the_line_is_bounded_by_prompts_and_by_tokens() -> None:
    line = AdmissionQueue(2, 100, Clock())
    line.enter(1, 60)
    assert refused(line, 1, 41) == RETRY_AFTER_SECONDS
    line.enter(1, 40)
    assert refused(line, 1, 0) == RETRY_AFTER_SECONDS
    line.leave(1, 60, was_served=True)
    line.enter(1, 60)
    assert (line.num_requests, line.num_tokens) == (2, 100)


def test_what_is_alone_is_let_in_however_long() -> None:
    line = AdmissionQueue(2, 100, Clock())
    line.enter(5, 10_000)
    assert refused(line, 1, 1)
    line.leave(5, 10_000)
    line.enter(1, 1)


def test_retry_after_is_what_the_line_measured() -> None:
    """Ten tokens a second leave: a hundred too many take ten seconds."""
    clock = Clock()
    line = AdmissionQueue(1000, 1000, clock)
    line.enter(100, 1000)
    for _ in range(50):
        clock.now += 1
        line.leave(1, 10, was_served=True)
        line.enter(1, 10)
    assert refused(line, 1, 100) == 10
    assert refused(line, 1, 30) == 3
    assert refused(line, 901, 0) == 1
    assert refused(line, 1, 100_000) == MAX_RETRY_SECONDS


def test_what_left_unserved_and_time_without_a_line_are_no_rate() -> None:
    clock = Clock()
    line = AdmissionQueue(1000, 1000, clock)
    line.enter(1, 500)
    line.leave(1, 500)
    clock.now += 3600
    line.enter(1, 1000)
    assert refused(line, 1, 1) == RETRY_AFTER_SECONDS
    clock.now += 10
    line.leave(1, 1000, was_served=True)
    clock.now += 3600
    line.enter(1, 1000)
    assert refused(line, 1, 200) == 2


def test_bytes_per_token_are_those_of_the_bodies_that_came() -> None:
    line = AdmissionQueue(1, 1, Clock())
    assert line.estimate_tokens(4_000) == 1_000
    line.record_tokens(1_996_000, 999_000)
    line.record_tokens(4_000_000, 2_000_000)
    assert line.estimate_tokens(2_000) == 1_000


def test_a_full_line_refuses_before_the_body_is_tokenised() -> None:
    with serving(max_queued_requests=2) as live:
        live.engine.may_step.clear()
        encode, texts = live.engine.tokenizer.encode, []
        live.engine.tokenizer.encode = lambda text: (texts.append(text), encode(text))[1]
        with live.connect(prompt="a"), live.connect(prompt="b"):
            eventually(lambda: len(live.engine.running), equals=2)
            for path in ("/v1/completions", "/v1/sessions"):
                response = live.client.post(path, json={"prompt": "refused"})
                assert response.status_code == 429
                error = response.json()["error"]
                assert (error["code"], error["type"]) == ("queue_full", "rate_limit_error")
                assert int(response.headers["retry-after"]) == RETRY_AFTER_SECONDS
            assert "refused" not in texts
            live.engine.may_step.set()
        eventually(lambda: line_of(live), equals=(0, 0))
        assert live.complete(prompt="c").status_code == 200
        assert "c" in texts


def test_a_line_is_bounded_by_the_tokens_of_bodies_that_come_in_pieces() -> None:
    """Nobody announces their length, so that all of it is read; the estimate refuses it."""
    with serving(max_queued_tokens=100) as live:
        live.engine.may_step.clear()
        with live.connect(prompt="x" * 90):
            eventually(lambda: live.engine.running)
            pieces = iter([b'{"prompt": "', b"x" * 1000, b'"}'])
            assert live.client.post("/v1/completions", content=pieces).status_code == 429
            live.engine.may_step.set()


def test_many_prompts_in_one_body_are_counted_before_they_are_handed_in() -> None:
    with serving(max_queued_requests=4) as live:
        live.engine.may_step.clear()
        with live.connect(prompt="a"):
            eventually(lambda: live.engine.running)
            assert live.complete(prompt=["x"] * 4).status_code == 429
            assert len(live.engine.seen) == 1
            live.engine.may_step.set()
        assert live.complete(prompt=["x"] * 3).status_code == 200


def line_of(live: Live) -> tuple[int, int]:
    return (
        live.async_engine.admission_queue.num_requests,
        live.async_engine.admission_queue.num_tokens,
    )


def test_whoever_has_a_token_leaves_and_whoever_goes_does_too() -> None:
    with serving() as live:
        live.engine.step_seconds = 0.01
        with live.connect(prompt="abc", max_tokens=10_000, stream=True):
            eventually(lambda: live.engine.num_generated > 3)
            eventually(lambda: line_of(live), equals=(0, 0))
        eventually(lambda: not live.engine.running)
        live.engine.may_step.clear()
        with live.connect(prompt="abc", max_tokens=10_000, stream=True):
            eventually(lambda: line_of(live), equals=(1, 3))
        eventually(lambda: line_of(live), equals=(0, 0))
        live.engine.may_step.set()
        assert live.complete(prompt="x", timeout=0).status_code == 400
        assert live.complete(prompt=[999]).status_code == 400
        assert line_of(live) == (0, 0)


@pytest.mark.parametrize("is_setting", [True, False])
def test_time_that_is_over_ends_with_what_there_is(is_setting: bool) -> None:
    limit = {"max_request_seconds": 1.0} if is_setting else {}
    body = {"timeout": 600.0 if is_setting else 1.0}
    with serving(**limit) as live:
        live.engine.step_seconds = 0.01
        whole = live.complete(prompt="x", max_tokens=100_000, **body)
        assert whole.status_code == 200
        (choice,) = whole.json()["choices"]
        assert choice["finish_reason"] == "timeout"
        assert choice["text"].startswith("abc")
        *_, last, done = live.events(prompt="x", max_tokens=100_000, **body)
        assert (last["choices"][0]["finish_reason"], done) == ("timeout", "[DONE]")
        eventually(lambda: live.engine.running, equals={})


@contextlib.contextmanager
def no_step_before_it_is_cancelled(live: Live) -> Iterator[None]:
    """Hold the engine until the request in the block is over for the server.

    On a busy machine it may be over before it reaches the engine.
    """
    answered = threading.Event()

    def is_over() -> bool:
        running = [*live.engine.running.values()]
        return answered.is_set() or any(r.cancelled_at is not None for r in running)

    def let_go() -> None:
        eventually(is_over)
        live.engine.may_step.set()

    live.engine.may_step.clear()
    with ThreadPoolExecutor() as pool:
        letting = pool.submit(let_go)
        yield
        answered.set()
        letting.result()


def test_time_that_is_over_before_the_first_token_is_a_504() -> None:
    with serving() as live:
        with no_step_before_it_is_cancelled(live):
            response = live.complete(prompt="x", timeout=0.05)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "timeout"
        assert live.complete(prompt="x", max_tokens=1, timeout=30).status_code == 200


def test_time_passes_while_a_prompt_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as live:
        live.step_with_loop()
        encode = live.engine.tokenizer.encode

        def slowly(text: str) -> list[int]:
            time.sleep(0.5)
            return encode(text)

        monkeypatch.setattr(live.engine.tokenizer, "encode", slowly)
        assert live.complete(prompt="x", max_tokens=1, timeout=0.3).status_code == 504


def test_time_is_over_for_a_prompt_that_a_session_reads() -> None:
    with serving(max_request_seconds=0.05) as live:
        with no_step_before_it_is_cancelled(live):
            response = live.client.post("/v1/sessions", json={"prompt": "x"})
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")


def test_a_turn_that_waits_too_long_is_a_504() -> None:
    with serving() as live:
        name = live.opened("hello")
        live.engine.may_step.clear()
        with live.connect(session_id=name, prompt="x", stream=True):
            eventually(lambda: live.engine.running)
            response = live.complete(session_id=name, prompt="y", on_conflict="wait", timeout=0.1)
            assert response.status_code == 504
            live.engine.may_step.set()
        assert live.complete(session_id=name, prompt="y", on_conflict="wait").status_code == 200


@pytest.mark.parametrize("timeout", [0, -1, "5", True, float("nan"), float("inf"), 10**400])
def test_a_timeout_that_is_none_is_refused(shared: Live, timeout: object) -> None:
    raw = json.dumps({"prompt": "x", "timeout": timeout})
    response = shared.client.post("/v1/completions", content=raw)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "timeout"


def test_a_queue_that_one_owner_has_filled_has_a_part_for_another() -> None:
    line = AdmissionQueue(10, 100, Clock())
    line.enter(1, 1_000_000, "a")
    for _ in range(5):
        line.enter(1, 10, "b")
    for owner, num_tokens in (("a", 1), ("b", 1)):
        with pytest.raises(ApiError):
            line.enter(1, num_tokens, owner)
    line.leave(1, 10, "b")
    line.enter(1, 10, "b")

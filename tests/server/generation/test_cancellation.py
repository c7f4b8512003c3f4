"""Requests and turns that are cancelled by their ids: who may, what is left, and what is answered.

`live` is one server for all tests; every request in it is cancelled or ends.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from cottention.server.generation import cancellation
from tests.server.fake_engine import FakeEngine
from tests.server.limits.test_api_keys import bearer
from tests.server.live import Live, eventually, serving
from tests.server.sse import read_events, read_told, text_of

ENDLESS = {"prompt": "y", "max_tokens": 1_000_000}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(FakeEngine(step_seconds=0.002)) as live:
        yield live


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def cancel(live: Live, request_id: str, key: str | None = None) -> tuple[int, Any]:
    headers = {} if key is None else bearer(key)
    response = live.client.post(f"/v1/requests/{request_id}/cancel", headers=headers)
    body = response.json()
    return response.status_code, body.get("status") or body["error"]["code"]


def begun(
    live: Live, pool: ThreadPoolExecutor, key: str | None = None, **body: Any
) -> "Future[httpx.Response]":
    """A request that has said something."""
    num_before = len(live.engine.seen)
    headers = {} if key is None else bearer(key)
    asked = pool.submit(live.client.post, "/v1/completions", json=ENDLESS | body, headers=headers)
    eventually(lambda: len(live.engine.seen) > num_before and live.engine.seen[-1].said > 2)
    return asked


@pytest.mark.parametrize("prefix", ["", "cmpl-"])
def test_a_whole_answer_ends_with_what_it_has(
    live: Live, pool: ThreadPoolExecutor, prefix: str
) -> None:
    asked = begun(live, pool, request_id=f"mine{prefix}", n=2)
    assert cancel(live, f"{prefix}mine{prefix}") == (200, "cancelled")
    answer = asked.result().json()
    assert [each["finish_reason"] for each in answer["choices"]] == ["abort"] * 2
    assert answer["choices"][0]["text"].startswith("abc")
    assert cancel(live, f"mine{prefix}") == (200, "cancelled")
    assert not live.engine.running


def test_a_stream_ends_with_an_end(live: Live) -> None:
    with live.client.stream("POST", "/v1/completions", json=ENDLESS | {"stream": True}) as stream:
        lines = stream.iter_lines()
        first = next(lines)
        request_id = first.split('"id":"')[1].split('"')[0]
        assert cancel(live, request_id) == (200, "cancelled")
        *_, last, done = [line for line in lines if line]
    assert '"finish_reason":"abort"' in last
    assert done == "data: [DONE]"


def test_before_its_first_token_the_answer_is_empty(pool: ThreadPoolExecutor) -> None:
    """Nobody is told to try again, as at a shutdown, or clients would do so by themselves."""
    with serving() as live:
        live.engine.may_step.clear()
        asked = pool.submit(live.complete, **ENDLESS, request_id="early")
        eventually(lambda: live.engine.running)
        ended = pool.submit(cancel, live, "early")
        eventually(lambda: all(r.cancelled_at is not None for r in live.engine.running.values()))
        live.engine.may_step.set()
        assert ended.result() == (200, "cancelled")
        [choice] = asked.result().json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("", "abort")


def test_an_end_that_takes_long_is_told_so(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancellation, "CANCEL_SECONDS", 0.0)
    with serving() as live:
        live.engine.may_step.clear()
        asked = pool.submit(live.complete, **ENDLESS, request_id="slow")
        eventually(lambda: live.engine.running)
        assert cancel(live, "slow") == (200, "cancelling")
        live.engine.may_step.set()
        assert asked.result().status_code == 200
        eventually(lambda: cancel(live, "slow"), equals=(200, "cancelled"))


def test_an_id_is_taken_while_its_request_runs(live: Live, pool: ThreadPoolExecutor) -> None:
    asked = begun(live, pool, request_id="taken")
    for same in ("taken", "cmpl-taken"):
        refused = live.complete(prompt="x", max_tokens=1, request_id=same)
        assert refused.status_code == 409
        assert refused.json()["error"]["code"] == "request_id_in_use"
    cancel(live, "taken")
    asked.result()
    for _ in range(3):  # an id is free as soon as its answer has been read
        assert live.complete(prompt="x", max_tokens=1, request_id="taken").status_code == 200
    assert cancel(live, "taken") == (200, "completed")


def test_ids_that_proxies_give_may_repeat(live: Live, pool: ThreadPoolExecutor) -> None:
    headers = {"X-Request-Id": "trace"}
    asked = [
        pool.submit(live.client.post, "/v1/completions", json=ENDLESS, headers=headers)
        for _ in range(2)
    ]
    eventually(lambda: len(live.engine.running), equals=2)
    assert cancel(live, "trace") == (200, "cancelled")
    assert [each.result().status_code for each in asked] == [200, 200]


def test_a_refused_request_frees_its_id(live: Live) -> None:
    for _ in range(2):
        body = {"prompt": [999], "request_id": "refused"}  # the engine's own check
        assert live.complete(**body).json()["error"]["param"] == "prompt"


def test_other_keys_requests_do_not_exist(pool: ThreadPoolExecutor) -> None:
    """And a key whose limit is used up can still cancel."""
    engine = FakeEngine(step_seconds=0.002)
    with serving(engine, api_key=("one", "two"), key_max_requests=1) as live:
        asked = begun(live, pool, key="one", request_id="same")
        assert cancel(live, "same", key="two") == (404, "request_not_found")
        other = begun(live, pool, key="two", request_id="same")
        assert cancel(live, "same", key="one") == (200, "cancelled")
        asked.result()
        assert not other.done()
        assert cancel(live, "same", key="two") == (200, "cancelled")
        other.result()
        assert cancel(live, "never", key="one") == (404, "request_not_found")


def cancel_turn(live: Live, session_id: str) -> tuple[int, Any]:
    response = live.client.post(f"/v1/sessions/{session_id}/cancel")
    body = response.json()
    return response.status_code, body.get("status") or body["error"]["code"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("on_cancel", ["keep", "rollback"])
def test_a_turn_without_its_client_is_cancelled(live: Live, on_cancel: str, stream: bool) -> None:
    session_id = live.opened("x")
    turn = {"session_id": session_id, "on_disconnect": "continue", "on_cancel": on_cancel}
    with live.connect(**ENDLESS, **turn, stream=stream) as sock:
        if stream:
            read_events(sock, 2)
        eventually(lambda: live.sessions.leased and live.engine.seen[-1].said > 5)
    assert cancel_turn(live, session_id) == (200, "cancelled")
    assert cancel_turn(live, session_id) == (200, "idle")
    told = (
        read_told(live.client.get(f"/v1/sessions/{session_id}/events").text)
        if (on_cancel == "keep")
        else []
    )
    kept = live.text_of(session_id)
    assert kept == ("xy" + text_of(told) if on_cancel == "keep" else "x")
    if told:
        assert told[-2].json["choices"][0]["finish_reason"] == "abort"
        assert len(kept) > 6
    following = live.complete(prompt="z", session_id=session_id, max_tokens=1)
    assert following.status_code == 200


def test_a_turn_that_waits_is_cancelled_by_its_request(
    live: Live, pool: ThreadPoolExecutor
) -> None:
    session_id = live.opened("x")
    running = begun(live, pool, session_id=session_id)
    body = {"session_id": session_id, "on_conflict": "wait", "request_id": "waits"}
    waiting = pool.submit(live.complete, **ENDLESS | {"prompt": "z"}, **body)
    eventually(lambda: len(live.turns._queues["", session_id]), equals=2)
    assert cancel(live, "waits") == (200, "cancelled")
    refused = waiting.result()
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "request_cancelled")
    assert cancel_turn(live, session_id) == (200, "cancelled")
    assert live.text_of(session_id) == "xy" + running.result().json()["choices"][0]["text"]


def test_an_append_is_cancelled_and_leaves_nothing(pool: ThreadPoolExecutor) -> None:
    with serving() as live:
        session_id = live.opened("x")
        live.engine.may_step.clear()
        path = f"/v1/sessions/{session_id}/append"
        asked = pool.submit(live.client.post, path, json={"prompt": "y"})
        eventually(lambda: live.engine.running)
        ended = pool.submit(cancel_turn, live, session_id)
        eventually(lambda: all(r.cancelled_at is not None for r in live.engine.running.values()))
        live.engine.may_step.set()
        assert ended.result() == (200, "cancelled")
        assert asked.result().json()["error"]["code"] == "request_cancelled"
        assert live.text_of(session_id) == "x"


def test_a_turn_is_cancelled_while_its_session_is_fetched(pool: ThreadPoolExecutor) -> None:
    """A thread reads it from the disk; what that begins is given back."""
    with serving() as live:
        session_id, begin, may_begin = live.opened("x"), live.sessions.begin, threading.Event()

        def begin_late(*args: Any) -> Any:
            may_begin.wait()
            return begin(*args)

        live.sessions.begin = begin_late
        path = f"/v1/sessions/{session_id}/append"
        asked = pool.submit(live.client.post, path, json={"prompt": "y"})
        eventually(lambda: live.turns._active)
        assert cancel_turn(live, session_id) == (200, "cancelled")
        assert asked.result().json()["error"]["code"] == "request_cancelled"
        may_begin.set()
        eventually(lambda: live.sessions.ends == ["abandon"] and not live.sessions.leased)
        assert live.text_of(session_id) == "x"


def test_a_session_is_deleted_with_its_turn(live: Live, pool: ThreadPoolExecutor) -> None:
    """Before those that wait for it, whose session is gone; `If-Match` is of before the turn."""
    session_id = live.opened("x")
    path, held = f"/v1/sessions/{session_id}", {"If-Match": '"1"'}
    running = begun(live, pool, session_id=session_id)
    waits = pool.submit(live.complete, **ENDLESS, session_id=session_id, on_conflict="wait")
    eventually(lambda: len(live.turns._queues["", session_id]), equals=2)
    assert live.client.delete(path).status_code == 409
    wrong = live.client.delete(path, params={"cancel": "true"}, headers={"If-Match": '"7"'})
    assert wrong.status_code == 412
    assert not running.done()
    deleted = live.client.delete(path, params={"cancel": "true"}, headers=held)
    assert deleted.json() == {"id": session_id, "object": "session", "deleted": True}
    assert running.result().json()["choices"][0]["finish_reason"] == "abort"
    assert waits.result().status_code == 404
    assert cancel_turn(live, session_id) == (404, "session_not_found")


def test_deletion_takes_true_or_false(live: Live) -> None:
    session_id = live.opened("x")
    for query in ({"cancel": "perhaps"}, {"cancle": "true"}):
        assert live.client.delete(f"/v1/sessions/{session_id}", params=query).status_code == 400
    for query in ({"cancel": "false"}, {"cancel": "true"}):
        assert live.client.delete(f"/v1/sessions/{live.opened('x')}", params=query).is_success


def test_only_the_last_ended_ids_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of requests is bounded."""
    monkeypatch.setattr(cancellation, "MAX_ENDED", 4)
    with serving() as live:
        for place in range(3):
            assert live.complete(prompt="x", max_tokens=1, request_id=f"old{place}").is_success
        assert [cancel(live, f"old{place}")[0] for place in range(3)] == [404, 200, 200]

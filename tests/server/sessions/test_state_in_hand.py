"""States that clients keep themselves: what is refused, and where an answer has its state."""

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from cottention.engine.errors import NonFiniteStateError, StateTooLargeError
from tests.server.live import Live, eventually, serving
from tests.server.responses.test_responses import TEMPLATE

SHORT: dict[str, Any] = {"max_tokens": 3, "return_state": True}


def in_base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def held_by(state: str) -> str:
    """What a state of the fake sessions holds."""
    return base64.b64decode(state).removeprefix(b"fake:").decode()


def error_of(response: httpx.Response) -> tuple[int, Any, Any]:
    error = response.json()["error"]
    return response.status_code, error["param"], error["code"]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(template=TEMPLATE) as live:
        yield live


def test_a_state_is_what_a_session_would_hold(live: Live) -> None:
    first = live.complete(prompt="x", **SHORT).json()
    assert held_by(first["state"]) == "xabc"
    assert (first["usage"]["prompt_tokens"], first.get("session")) == (1, None)
    later = live.complete(prompt="y", state=first["state"], **SHORT).json()
    assert held_by(later["state"]) == "xabcyabc"
    assert later["usage"]["prompt_tokens"] == 1
    without = live.complete(prompt="y", state=first["state"], max_tokens=3).json()
    assert "state" not in without
    assert live.sessions.kept == {}, "nothing of it stays in the server"


@pytest.mark.parametrize("prompt", [{}, {"prompt": ""}, {"prompt": []}])
def test_after_a_state_the_prompt_may_be_empty(live: Live, prompt: dict[str, Any]) -> None:
    answer = live.complete(state=in_base64(b"fake:x"), **prompt, **SHORT).json()
    assert held_by(answer["state"]) == "xabc"


def test_a_prompt_is_read_without_an_answer(live: Live) -> None:
    """So that a long prompt is read once for many answers."""
    answer = live.complete(prompt="xyz", max_tokens=0, return_state=True).json()
    assert (held_by(answer["state"]), answer["choices"][0]["text"]) == ("xyz", "")
    assert error_of(live.complete(prompt="x", state=answer["state"], max_tokens=0))[:2] == (
        400,
        "max_tokens",
    )


@pytest.mark.parametrize("options", [None, {"include_usage": True}])
@pytest.mark.parametrize("more", [{}, {"continuous_usage_stats": True}])
def test_a_stream_has_it_in_the_last_chunk_of_its_text(
    live: Live, options: dict[str, Any] | None, more: dict[str, Any]
) -> None:
    if options is not None:
        options = options | more
    *chunks, done = live.events(prompt="x", stream_options=options, **SHORT)
    assert done == "[DONE]"
    told = [chunk for chunk in chunks if chunk["choices"]]
    assert "".join(chunk["choices"][0]["text"] for chunk in told) == "abc"
    assert held_by(told[-1].pop("state")) == "xabc"
    assert told[-1]["choices"][0]["finish_reason"] == "length"
    assert all("state" not in chunk for chunk in chunks), "it is long, and comes once"


def test_an_answer_that_was_cut_has_none(live: Live) -> None:
    """Its tokens are known, but the client may have got fewer."""
    endless = {"prompt": "y", "max_tokens": 1_000_000, "return_state": True, "request_id": "cut"}
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(live.client.post, "/v1/completions", json=endless)
        eventually(lambda: any(each.said > 2 for each in [*live.engine.running.values()]))
        live.client.post("/v1/requests/cut/cancel")
        answer = asked.result().json()
    assert (answer["choices"][0]["finish_reason"], answer["state"]) == ("abort", None)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 2}, "n"),
    ({"best_of": 2}, "best_of"),
    ({"echo": True}, "echo"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"on_disconnect": "continue"}, "on_disconnect"),
]


@pytest.mark.parametrize(("fields", "name"), REFUSED)
@pytest.mark.parametrize("field", ["state", "return_state"])
def test_what_makes_no_sense_is_refused_by_name(
    live: Live, fields: dict[str, Any], name: str, field: str
) -> None:
    asked = {"state": in_base64(b"fake:x")} if field == "state" else {"return_state": True}
    response = live.complete(**{"prompt": "x"} | asked | fields)
    assert error_of(response)[:2] == (400, name)
    if name != "on_disconnect":  # which is a session's alone
        assert field in response.json()["error"]["message"]


def test_a_session_has_a_state_of_its_own(live: Live) -> None:
    session_id = live.opened("x")
    for asked in ({"state": in_base64(b"fake:x")}, {"return_state": True}):
        [name] = asked
        response = live.complete(prompt="x", session_id=session_id, **asked)
        assert error_of(response)[:2] == (400, name)
        assert "/snapshot" in response.json()["error"]["message"]
    live.client.delete(f"/v1/sessions/{session_id}")


@pytest.mark.parametrize(
    ("state", "status", "code"),
    [
        (in_base64(b"other:x"), 409, "snapshot_mismatch"),
        (in_base64(b"nothing"), 400, "bad_snapshot"),
        ("", 400, "bad_snapshot"),
        ("not base64", 400, "bad_snapshot"),
        ("ZmFrZTp4é", 400, "bad_snapshot"),
        ("ZmFrZTp", 400, "bad_snapshot"),
        ("A" * 1_500_000, 413, "body_too_large"),
        (["fake:x"], 400, None),
        (7, 400, None),
    ],
)
@pytest.mark.parametrize("is_chat", [False, True])
def test_a_state_that_is_none_is_told_as_by_an_import(
    live: Live, state: Any, status: int, code: str | None, is_chat: bool
) -> None:
    response = live.chat("x", state=state) if is_chat else live.complete(prompt="x", state=state)
    assert error_of(response) == (status, "state", code)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (NonFiniteStateError("a session's message"), 500, "state_not_finite"),
        (StateTooLargeError("a session's message"), 409, "state_too_large"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_state_that_cannot_be_returned_is_an_error(
    live: Live, error: Exception, status: int, code: str, stream: bool
) -> None:
    """Without it the client could not go on, and would not know why."""
    live.sessions.fails["snapshot"] = error
    if not stream:
        response = live.complete(prompt="x", **SHORT)
        assert error_of(response) == (status, "return_state", code)
        assert "session" not in response.json()["error"]["message"]
        return
    *_, last = live.events(prompt="x", **SHORT)
    assert last["error"]["code"] == code, "no [DONE]: clients raise an error"


def test_a_failed_answer_is_an_error(live: Live) -> None:
    assert live.complete(prompt="fail", **SHORT).status_code == 500
    *_, last = live.events(prompt="fail", **SHORT)
    assert last["error"]["type"] == "server_error"


def test_a_state_counts_among_what_responses_may_have() -> None:
    """Slow readers would hold the memory of any number of states."""
    with serving(max_response_items=1000) as live:
        response = live.complete(prompt="x", **SHORT)
        assert error_of(response)[:2] == (400, "return_state")
        assert "for its state" in response.json()["error"]["message"]

"""Responses and messages with an Idempotency-Key, over a real engine and a folder."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cottention.engine.errors import StoreUnavailableError
from tests.server.idempotency.test_keys import num_prompt_tokens, send, server
from tests.server.live import Live, eventually
from tests.server.responses.test_responses import error_of, events_of, get

RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
BODY: dict[str, Any] = {"input": "def f(x):", "max_output_tokens": 12, "temperature": 1}
"""Without a seed: two executions say different things."""
MESSAGE: dict[str, Any] = {
    "messages": [{"role": "user", "content": "def f(x):"}],
    "max_tokens": 12,
    "temperature": 1,
}
RUNNING = ("queued", "in_progress")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with server(tmp_path_factory.mktemp("sessions")) as opened:
        yield opened


def ended(live: Live, response_id: str) -> Any:
    eventually(lambda: get(live, response_id).json()["status"] not in RUNNING)
    return get(live, response_id).json()


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    "more", [{"store": False}, {"store": True}, {"store": True, "background": True}]
)
def test_a_response_is_made_once(live: Live, is_stream: bool, more: dict[str, Any]) -> None:
    """Its id would be another at the second time, and its text."""
    key = f"made{is_stream}{len(more)}{more['store']}"
    body = BODY | more | {"stream": is_stream}
    first = send(live, RESPONSES, key, **body)
    assert first.status_code == 200, first.text
    if is_stream:
        events = events_of(first.text)
        assert events[-1]["type"] in ("response.completed", "response.incomplete")
        response_id = events[-1]["response"]["id"]
    else:
        response_id = first.json()["id"]
    if more["store"]:
        ended(live, response_id)
    before = num_prompt_tokens(live)
    again = send(live, RESPONSES, key, **body)
    assert (again.status_code, again.content) == (200, first.content)
    assert again.headers["content-type"] == first.headers["content-type"]
    assert num_prompt_tokens(live) == before
    other = send(live, RESPONSES, key, **(body | {"max_output_tokens": 2}))
    assert error_of(other) == (422, "Idempotency-Key", "idempotency_key_reused")


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_message_is_made_once(live: Live, is_stream: bool) -> None:
    """Anthropic's clients send the key with what they send again."""
    key, body = f"message{is_stream}", MESSAGE | {"stream": is_stream}
    first = send(live, MESSAGES, key, **body)
    assert first.status_code == 200, first.text
    assert not is_stream or events_of(first.text)[-1]["type"] == "message_stop"
    before = num_prompt_tokens(live)
    again = send(live, MESSAGES, key, **body)
    assert (again.status_code, again.content) == (200, first.content)
    assert num_prompt_tokens(live) == before
    other = send(live, MESSAGES, key, **(body | {"max_tokens": 2}))
    assert (other.status_code, other.json()["type"]) == (422, "error")


def test_those_that_come_meanwhile_get_the_same_response(live: Live) -> None:
    for is_stream in (False, True):
        body = BODY | {"max_output_tokens": 150, "store": True, "stream": is_stream}
        with ThreadPoolExecutor(6) as pool:
            answers = [
                *pool.map(
                    lambda _, body=body: send(live, RESPONSES, f"at-once{body['stream']}", **body),
                    range(6),
                )
            ]
        assert {each.status_code for each in answers} == {200}
        assert len({each.content for each in answers}) == 1


def test_one_in_the_background_is_told_at_once_and_made_once(live: Live) -> None:
    """Its client would wait for the end of what it asked for in the background."""
    body = BODY | {
        "max_output_tokens": 1_000_000,
        "temperature": 0,
        "store": True,
        "background": True,
    }
    answers = [send(live, RESPONSES, "background", **body) for _ in range(3)]
    assert {each.json()["status"] for each in answers} == {"queued"}
    [response_id] = {each.json()["id"] for each in answers}
    assert get(live, response_id).json()["status"] in RUNNING
    live.client.post(f"{RESPONSES}/{response_id}/cancel")
    assert ended(live, response_id)["status"] == "cancelled"
    assert send(live, RESPONSES, "background", **body).content == answers[0].content


def test_one_that_failed_in_the_background_is_made_again(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the key would name for a day what nobody can read."""
    body = BODY | {"store": True, "background": True}

    def commit(*_: Any, **__: Any) -> None:
        raise StoreUnavailableError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(live.sessions, "commit", commit)
        lost = send(live, RESPONSES, "failed", **body).json()["id"]
        eventually(lambda: get(live, lost).status_code == 404)

    def made() -> str:
        return str(send(live, RESPONSES, "failed", **body).json()["id"])

    eventually(lambda: made() != lost)
    assert made() == made()
    assert ended(live, made())["error"] is None


def test_responses_outlive_the_server_with_their_keys(tmp_path: Path) -> None:
    kept = BODY | {"store": True}
    cases = [(kept, "whole"), (kept | {"stream": True}, "streamed")]
    background = kept | {"background": True}
    with server(tmp_path) as live:
        told = [send(live, RESPONSES, key, **body).content for body, key in cases]
        queued = send(live, RESPONSES, "background", **background)
        whole = ended(live, queued.json()["id"])
    with server(tmp_path) as live:
        assert [send(live, RESPONSES, key, **body).content for body, key in cases] == told
        assert send(live, RESPONSES, "background", **background).content == queued.content
        assert get(live, whole["id"]).json() == whole


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("is_background", [False, True])
def test_a_response_and_its_answer_are_stored_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stream: bool, is_background: bool
) -> None:
    """A server that died between the two would execute the request again at its next start."""
    body = BODY | {"store": True, "stream": is_stream, "background": is_background}

    def dies(*_: Any) -> None:
        raise StoreUnavailableError("the server has died")

    with server(tmp_path) as live:
        for name in ("keep_answer", "drop_claim"):
            monkeypatch.setattr(live.sessions, name, dies)
        first = send(live, RESPONSES, "cut", **body)
        told = events_of(first.text)[-1]["response"] if is_stream else first.json()
        whole = ended(live, told["id"])
    with server(tmp_path) as live:
        before = num_prompt_tokens(live)
        assert send(live, RESPONSES, "cut", **body).content == first.content
        assert num_prompt_tokens(live) == before
        assert get(live, told["id"]).json() == whole
        assert live.sessions.sizes().num_stored + live.sessions.sizes().num_parked == 1

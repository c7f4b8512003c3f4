"""Requests with an Idempotency-Key, over a real engine and a folder: executed once, repeated."""

import contextlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from cottention.engine.config import EngineConfig
from cottention.engine.engine import Engine
from cottention.server.config import ServerConfig
from cottention.server.generation.chat_template import find_template
from cottention.server.sessions.storage import open_sessions
from tests.engine.making import model_folder
from tests.server.live import Live, eventually, serving

BODY: dict[str, Any] = {"prompt": "def f(x):", "max_tokens": 12, "ignore_eos": True}
"""Without a seed: two executions say different things."""


@contextlib.contextmanager
def server(folder: Path | None, **settings: Any) -> Iterator[Live]:
    engine = Engine(model_folder("cottention"), EngineConfig(max_slots=4))
    config = ServerConfig(session_dir=None if folder is None else str(folder))
    with (
        open_sessions(engine, config) as sessions,
        serving(engine, find_template("plain", Path()), sessions, **settings) as live,
    ):
        yield live


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with server(tmp_path_factory.mktemp("sessions")) as opened:
        yield opened


def send(live: Live, path: str, key: str, **body: Any) -> httpx.Response:
    return live.client.post(path, json=body, headers={"Idempotency-Key": key})


def num_prompt_tokens(live: Live) -> int:
    return live.engine.stats().num_prompt_tokens


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("has_session", [False, True])
def test_the_answer_is_repeated(live: Live, path: str, is_stream: bool, has_session: bool) -> None:
    """Byte for byte, without anything computed or a turn added."""
    body = {**BODY, "stream": is_stream}
    if path.endswith("chat/completions"):
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    if has_session:
        body["session_id"] = live.opened("a")
    key = f"{path}{is_stream}{has_session}"
    first = send(live, path, key, **body)
    assert first.status_code == 200, first.text
    before = num_prompt_tokens(live)
    again = send(live, path, key, **body)
    assert (again.status_code, again.content) == (200, first.content)
    assert again.headers["content-type"] == first.headers["content-type"]
    assert again.headers.get("etag") == first.headers.get("etag")
    assert num_prompt_tokens(live) == before
    other = send(live, path, key, **(body | {"max_tokens": 2}))
    assert other.status_code == 422
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    if has_session:
        assert live.session(str(body["session_id"]))["version"] == 2


@pytest.mark.parametrize(("verb", "body"), [("append", {"prompt": "x"}), ("fork", {"n": 3})])
def test_appends_and_forks_happen_once(live: Live, verb: str, body: dict[str, Any]) -> None:
    session_id = live.opened("a")
    path = f"/v1/sessions/{session_id}/{verb}"
    first, again = (send(live, path, verb, **body) for _ in range(2))
    assert first.status_code == 200
    assert again.content == first.content
    assert live.session(session_id)["position"] == (2 if verb == "append" else 1)
    # what is told is what is stored
    told = [first.json()] if verb == "append" else first.json()["data"]
    assert [live.session(each["id"])["version"] for each in told] == [
        each["version"] for each in told
    ]


def test_requests_that_come_meanwhile_get_the_same_answer(live: Live) -> None:
    """A retry while the first still runs must neither run beside it nor be refused."""
    session_id = live.opened("a")
    body = {**BODY, "max_tokens": 200, "stream": True, "session_id": session_id}
    with ThreadPoolExecutor(8) as pool:
        answers = [
            *pool.map(lambda _: send(live, "/v1/completions", "meanwhile", **body), range(8))
        ]
    assert {each.status_code for each in answers} == {200}
    assert len({each.content for each in answers}) == 1
    session = live.session(session_id)
    assert (session["version"], session["position"] > 200) == (2, True)
    assert session["position"] < 300


def test_it_runs_to_its_end_without_its_client(live: Live) -> None:
    """Or a client whose connection broke would repeat a turn that was cut and kept."""
    session_id = live.opened("a")
    body = {**BODY, "max_tokens": 300, "stream": True, "session_id": session_id}
    with live.client.stream(
        "POST", "/v1/completions", json=body, headers={"Idempotency-Key": "left"}
    ) as response:
        next(response.iter_raw())
    again = send(live, "/v1/completions", "left", **body)
    assert again.text.endswith("data: [DONE]\n\n")
    session = live.session(session_id)
    assert (session["version"], session["position"] > 300) == (2, True)


def test_what_fails_may_be_sent_again(live: Live) -> None:
    """A key must not repeat an error of the moment for a day."""
    session_id = live.opened("a")
    path = f"/v1/sessions/{session_id}/append"
    turn = live.sessions.begin("", session_id)
    busy = send(live, path, "again", prompt="x")
    assert busy.status_code == 409
    live.sessions.abandon(turn)
    assert send(live, path, "again", prompt="x").status_code == 200


def test_answers_outlive_the_server(tmp_path: Path) -> None:
    """Also whether a turn happened: it is stored in the turn's own transaction."""
    with server(tmp_path) as live:
        session_id = live.opened("a")
        body = BODY | {"session_id": session_id}
        first = send(live, "/v1/completions", "k", **body)
        alone = send(live, "/v1/completions", "alone", **BODY)
    with server(tmp_path) as live:
        assert send(live, "/v1/completions", "k", **body).content == first.content
        assert send(live, "/v1/completions", "alone", **BODY).content == alone.content
        assert live.session(session_id)["version"] == 2


def test_a_long_answer_is_sent_once_and_not_kept() -> None:
    """It is never executed a second time."""
    with server(None, idempotency_bytes=200) as live:
        session_id = live.opened("a")
        for more in ({}, {"stream": True}, {"session_id": session_id, "stream": True}):
            body, key = BODY | more, json.dumps(more)[:99].replace(" ", "")
            first = send(live, "/v1/completions", key, **body)
            assert first.status_code == 200, (more, first.text)
            assert len(first.content) > 200
            again = send(live, "/v1/completions", key, **body)
            assert again.status_code == 410, (more, again.text)
            assert again.json()["error"]["code"] == "answer_not_kept"
        assert live.session(session_id)["version"] == 2


@pytest.mark.parametrize("key", ["", "x" * 256, "a b"])
def test_what_is_no_key_is_refused(live: Live, key: str) -> None:
    refused = send(live, "/v1/completions", key, **BODY)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "Idempotency-Key"


def test_a_running_request_with_a_key_is_cancelled_by_its_id(live: Live) -> None:
    """It has no other way to end early; its answer is what there was."""
    body = {**BODY, "max_tokens": 4000, "request_id": "to-cancel"}
    answers: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: answers.append(send(live, "/v1/completions", "cancel", **body))
    )
    thread.start()
    eventually(
        lambda: live.client.post("/v1/requests/to-cancel/cancel").json().get("status"),
        equals="cancelled",
    )
    thread.join()
    assert answers[0].json()["choices"][0]["finish_reason"] == "abort"
    assert send(live, "/v1/completions", "cancel", **body).content == answers[0].content

"""Turns that go on in a server that is killed, or told to stop: what is kept of what they told."""

import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.process import served
from tests.server.sse import Told, read_told, text_of

pytestmark = pytest.mark.slow

TURN = {"prompt": "def f(x):", "ignore_eos": True, "seed": 7, "stream": True}


def going_on(session_id: str, num: int) -> dict[str, Any]:
    return TURN | {"session_id": session_id, "max_tokens": num, "on_disconnect": "continue"}


def left_after(client: httpx.Client, num_events: int, body: dict[str, Any]) -> list[Told]:
    """The first events; then the connection is closed."""
    raw = ""
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            raw += f"{line}\n"
            if raw.count("\n\n") == num_events:
                break
    return read_told(raw)


def events(client: httpx.Client, session_id: str, last: str | None = None) -> list[Told]:
    headers = {} if last is None else {"Last-Event-ID": last}
    response = client.get(f"/v1/sessions/{session_id}/events", headers=headers)
    assert response.status_code == 200, response.text
    return read_told(response.text)


def opened(client: httpx.Client) -> str:
    session_id: str = client.post("/v1/sessions", json={}).json()["id"]
    return session_id


def test_a_turn_that_ended_is_told_after_kill_9(gptj_folder: Path, tmp_path: Path) -> None:
    with served(gptj_folder, tmp_path) as (popen, client):
        session_id, twin = opened(client), opened(client)
        begun = left_after(client, 1, going_on(session_id, 40))
        told = begun + events(client, session_id, begun[-1].id)
        whole = read_told(client.post("/v1/completions", json=going_on(twin, 40)).text)
        assert text_of(told) == text_of(whole)
        popen.send_signal(signal.SIGKILL)
        popen.wait(60)
    with served(gptj_folder, tmp_path) as (_, client):
        assert events(client, session_id) == told
        assert begun + events(client, session_id, begun[-1].id) == told
        assert len({each.id for each in told}) == len(told)
        assert told[-1].data == "[DONE]"
        session = client.get(f"/v1/sessions/{session_id}").json()
        assert session["position"] == told[-2].json["session"]["position"]


def test_a_turn_that_kill_9_cut_was_none(gptj_folder: Path, tmp_path: Path) -> None:
    with served(gptj_folder, tmp_path) as (popen, client):
        session_id = opened(client)
        first = read_told(client.post("/v1/completions", json=going_on(session_id, 5)).text)
        begun = left_after(client, 4, going_on(session_id, 1_000_000))
        popen.send_signal(signal.SIGKILL)
        popen.wait(60)
    with served(gptj_folder, tmp_path) as (_, client):
        assert client.get(f"/v1/sessions/{session_id}").json()["interrupted"] is True
        assert events(client, session_id) == first
        last = {"Last-Event-ID": begun[-1].id}
        answer = client.get(f"/v1/sessions/{session_id}/events", headers=last)
        assert answer.status_code == 410


@pytest.mark.parametrize(("seconds", "num", "reason"), [("60", 300, "length"), ("0.2", 10**6, "")])
def test_a_server_that_is_told_to_stop(
    gptj_folder: Path, tmp_path: Path, seconds: str, num: int, reason: str
) -> None:
    """As with any turn that runs: it may end, or what it told until then is kept."""
    with served(gptj_folder, tmp_path, "--drain-seconds", seconds) as (popen, client):
        session_id = opened(client)
        begun = left_after(client, 2, going_on(session_id, num))
        popen.send_signal(signal.SIGTERM)
        assert popen.wait(60) == 0
    with served(gptj_folder, tmp_path) as (_, client):
        told = events(client, session_id)
        assert told[-1].data == "[DONE]"
        end = told[-2].json
        assert end["choices"][0]["finish_reason"] == (reason or "abort")
        assert (
            end["session"]["position"]
            == client.get(f"/v1/sessions/{session_id}").json()["position"]
        )
        if begun[-1].id >= told[0].id and reason:
            assert begun + events(client, session_id, begun[-1].id) == told

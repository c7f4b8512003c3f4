"""Turns that go on in a server that is killed, or told to stop: what is kept of what they told."""

import signal
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

from tests.server.live import eventually
from tests.server.process import served
from tests.server.sse import Told, read_told, text_of

pytestmark = pytest.mark.slow

NUM_TOKENS = 3000
"""Of a turn that has not ended when a busy machine gets to ending its server."""
LOG = ("--session-event-log-bytes", "4M")
"""Holds all events of such a turn."""
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


def requests_logged(log: IO[str]) -> list[str]:
    log.seek(0)
    return [line for line in log if " INFO request " in line]


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


@pytest.mark.parametrize(
    ("number", "seconds"),
    [(signal.SIGKILL, "30"), (signal.SIGTERM, "0.1"), (signal.SIGTERM, "30")],
)
def test_a_turn_goes_on_at_the_next_start(
    gptj_folder: Path, tmp_path: Path, number: signal.Signals, seconds: str
) -> None:
    """It says what it would have said undisturbed, and its client gets each event once.

    One that has ended before the server does is told as it was.
    """
    with served(gptj_folder, tmp_path, *LOG, "--drain-seconds", seconds) as (popen, client):
        session_id, twin = opened(client), opened(client)
        whole = read_told(client.post("/v1/completions", json=going_on(twin, NUM_TOKENS)).text)
        begun = left_after(client, 4, going_on(session_id, NUM_TOKENS))
        popen.send_signal(number)
        popen.wait(60)
    with (
        (tmp_path / "log").open("w+") as log,
        served(gptj_folder, tmp_path, *LOG, stderr=log.fileno()) as (_, client),
    ):
        told = begun + events(client, session_id, begun[-1].id)
        [turn] = {each.id.partition("-")[0] for each in told}
        assert [each.id for each in told] == [f"{turn}-{n}" for n in range(len(told))]
        assert text_of(told) == text_of(whole)
        assert told[-1].data == "[DONE]"
        session = client.get(f"/v1/sessions/{session_id}").json()
        assert session["position"] == told[-2].json["session"]["position"]
        assert (session["interrupted"], session["version"]) == (False, 2)
        assert events(client, session_id) == told
        if (number, seconds) == (signal.SIGTERM, "30"):
            return  # it has ended before
        eventually(lambda: len(requests_logged(log)), equals=1)
        [line] = requests_logged(log)
        assert 'path="/v1/completions" status=200 ' in line
        assert f"completion_tokens={NUM_TOKENS} finish_reason=length" in line


def test_a_turn_that_ends_with_its_client_is_undone_by_kill_9(
    gptj_folder: Path, tmp_path: Path
) -> None:
    with served(gptj_folder, tmp_path) as (popen, client):
        session_id = opened(client)
        first = read_told(client.post("/v1/completions", json=going_on(session_id, 5)).text)
        body = TURN | {"session_id": session_id, "max_tokens": 1_000_000}
        with client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
            popen.send_signal(signal.SIGKILL)
            popen.wait(60)
    with served(gptj_folder, tmp_path) as (_, client):
        assert client.get(f"/v1/sessions/{session_id}").json()["interrupted"] is True
        assert events(client, session_id) == first

"""Responses in the background are kept from their start: what is found where none ends them."""

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from cottention.engine.errors import SessionQuotaError, StoreUnavailableError
from cottention.server.responses.values import INTERRUPTED, RUNNING
from tests.server.fake_engine import FakeEngine
from tests.server.live import Live, eventually, serving
from tests.server.process import served
from tests.server.responses.test_responses import (
    ENDLESS,
    TEMPLATE,
    begun,
    create,
    error_of,
    events_of,
    get,
    made,
)
from tests.server.sessions.test_events_restart import requests_logged


@pytest.fixture
def live() -> Iterator[Live]:
    with serving(FakeEngine(step_seconds=0.001), TEMPLATE) as live:
        yield live


@pytest.fixture
def other(live: Live) -> Iterator[Live]:
    """A second server of the same store."""
    with serving(template=TEMPLATE, sessions=live.sessions) as other:
        yield other


def ended(live: Live, response_id: str) -> Any:
    live.client.post(f"/v1/responses/{response_id}/cancel")
    eventually(lambda: not live.engine.running)
    return get(live, response_id).json()


def test_another_server_finds_that_it_runs(live: Live, other: Live) -> None:
    response_id = begun(live)
    found = get(other, response_id).json()
    assert (found["status"], found["output"]) == ("queued", [])
    items = other.client.get(f"/v1/responses/{response_id}/input_items").json()["data"]
    assert items[0]["content"][0]["text"] == "y"
    in_progress = [
        get(other, response_id, stream=True),
        other.client.post(f"/v1/responses/{response_id}/cancel"),
        create(other, "z", previous_response_id=response_id),
    ]
    assert {error_of(each)[2] for each in in_progress} == {"response_in_progress"}
    assert other.client.delete(f"/v1/responses/{response_id}").status_code == 409
    assert ended(live, response_id) == get(other, response_id).json()


def test_it_is_kept_once_and_without_what_was_before(live: Live) -> None:
    response_id = begun(live)
    assert len(live.sessions.kept) == 1
    ended(live, response_id)
    [session] = live.sessions.kept.values()
    assert session.num_checkpoints == 0, "nothing goes back to before its answer"
    assert live.sessions.leased == {}


def test_after_a_crash_it_has_failed_and_says_why(live: Live, other: Live) -> None:
    response_id = begun(live)
    kept = live.sessions.kept
    [session_id] = kept
    kept[session_id] = replace(kept[session_id], was_interrupted=True)
    found = get(other, response_id).json()
    assert (found["status"], found["error"]["message"]) == ("failed", INTERRUPTED)
    events = events_of(get(other, response_id, stream=True).text)
    assert events[-1]["type"] == "response.failed"
    refused = create(other, "z", previous_response_id=response_id)
    assert error_of(refused)[:2] == (400, "previous_response_id")
    ended(live, response_id)


def test_one_too_many_does_not_begin(live: Live) -> None:
    """Its client would wait for an answer that cannot be kept."""
    live.sessions.fails["open"] = SessionQuotaError("there are 5")
    assert error_of(create(live, "y", **ENDLESS))[2] == "too_many_responses"
    eventually(lambda: not live.engine.running)
    assert live.sessions.kept == {}


def test_what_became_of_it_cannot_be_kept(live: Live) -> None:
    response_id = made(live, "say:hello", store=True, background=True)["id"]
    eventually(lambda: get(live, response_id).json()["status"] == "completed")
    eventually(lambda: live.sessions.leased, equals={})  # else its own commit is the next
    live.sessions.fails["commit"] = StoreUnavailableError("the disk is full")
    lost = made(live, "say:hello", store=True, background=True)["id"]
    eventually(lambda: get(live, lost).status_code == 404)
    assert live.sessions.leased == {}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_goes_on_at_the_next_start(
    tmp_path: Path, gptj_folder: Path, number: signal.Signals
) -> None:
    """As undisturbed, whoever asks for it meanwhile; and one that has ended is as it was."""
    flags = ("--chat-template", "plain", "--max-slots", "2", "--drain-seconds", "0.1")
    flags += ("--session-event-log-bytes", "4M")  # else whoever asks late has missed some of them
    body = {"input": "y", "background": True, "temperature": 0, "max_output_tokens": 8000}

    def asked(client: httpx.Client) -> str:
        response_id = client.post("/v1/responses", json=body).json()["id"]
        return f"/v1/responses/{response_id}"

    def ended(client: httpx.Client, path: str) -> Any:
        eventually(lambda: client.get(path).json()["status"] not in RUNNING)
        return client.get(path).json()

    with served(gptj_folder, tmp_path, *flags) as (popen, client):
        done = asked(client)
        whole = ended(client, done)
        running = asked(client)
        with client.stream("GET", running, params={"stream": True}) as response:
            lines = response.iter_lines()
            first = [next(lines) for _ in range(40)]
            popen.send_signal(number)
            popen.wait(60)
    last = max(json.loads(each[6:])["sequence_number"] for each in first if each[:5] == "data:")
    told = [each for each in first if each.startswith("data: ")]
    with (
        (tmp_path / "log").open("w+") as log,
        served(gptj_folder, tmp_path, *flags, stderr=log.fileno()) as (_, client),
    ):
        params = {"stream": True, "starting_after": last}
        rest = events_of(client.get(running, params=params).text)
        assert client.get(done).json() == whole
        found = ended(client, running)
        assert found["output"][0]["content"] == whole["output"][0]["content"]
        assert found["usage"] == whole["usage"]
        events = [json.loads(each[6:]) for each in told] + rest
        assert events[-1]["response"] == found
        assert [each["sequence_number"] for each in events] == [*range(len(events))]
        num_tokens = found["usage"]["output_tokens"]
        eventually(lambda: len(requests_logged(log)), equals=1)
        [line] = requests_logged(log)
        assert 'path="/v1/responses" status=200 ' in line
        assert f"completion_tokens={num_tokens} " in line
        assert client.delete(running).json()["deleted"] is True

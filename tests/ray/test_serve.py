"""Replicas of Ray Serve: sessions are the database's, whichever replica a request gets to."""

import os
import re
import signal

import httpx
import psycopg
import pytest

from cottention.engine.errors import ConfigurationError
from cottention.server.cluster.ray import app
from tests.engine.postgres import PASSWORD
from tests.ray.served import NUM_REPLICAS, Served, eventually


def turn(served: Served, session_id: str, header: str | None = None) -> str:
    """The text of a turn of eight tokens."""
    body = {"session_id": session_id, "prompt": "x", "max_tokens": 8, "ignore_eos": True, "seed": 1}
    text: str = served.post("/v1/completions", header, **body)["choices"][0]["text"]
    return text


def position(served: Served, session_id: str) -> int:
    answer = served.client.get(f"/v1/sessions/{session_id}")
    assert answer.status_code == 200, answer.text
    at: int = answer.json()["position"]
    return at


def num_alive(served: Served) -> int:
    """Replicas whose heartbeats reach the database."""
    with psycopg.connect(served.postgres.url, password=PASSWORD) as db:
        statement = "SELECT count(*) FROM cottention.replicas WHERE until > clock_timestamp()"
        [[num]] = db.execute(statement).fetchall()
    count: int = num
    return count


def test_what_is_wrong_with_the_settings_is_said_before_anything_starts() -> None:
    """Else it would be in the log of an actor that Ray starts again and again."""
    with pytest.raises(ConfigurationError, match="there is no setting 'sesion_store'"):
        app({"sesion_store": "postgresql://a@b/c"})
    with pytest.raises(ConfigurationError, match="DRAIN_SECONDS must be a number"):
        app({"drain_seconds": "soon"})


def test_a_session_goes_on_at_whatever_replica(served: Served) -> None:
    """Without a header Ray spreads requests; the twin's go to one replica, and say the same."""
    eventually(lambda: num_alive(served) == NUM_REPLICAS)
    ours, twin = (served.post("/v1/sessions", prompt="def f(x):")["id"] for _ in range(2))
    assert [turn(served, ours) for _ in range(9)] == [turn(served, twin, twin) for _ in range(9)]
    assert position(served, ours) == position(served, twin)


def test_the_header_leads_to_one_replica(served: Served) -> None:
    """Where the session's state is in memory: the affinity that Ray's router can have."""
    session_id = served.post("/v1/sessions")["id"]

    def num_answered() -> int:
        text = served.client.get("/metrics", headers={"X-Session-Id": session_id}).text
        found = re.search(r'request_success_total\{finished_reason="length".*\} (\d+)', text)
        assert found
        return int(found[1])

    before = num_answered()
    for _ in range(8):
        turn(served, session_id, session_id)
    assert num_answered() == before + 8


def test_it_streams(served: Served) -> None:
    """Ray's proxy passes events on; a server merges those that are read late."""
    body = {"prompt": "x", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with served.client.stream("POST", "/v1/completions", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 2


def test_a_replica_that_is_killed_is_replaced_and_loses_no_turn(served: Served) -> None:
    """The database has them: that is what Ray's own actors do not keep."""
    sessions = [served.post("/v1/sessions")["id"] for _ in range(6)]
    texts = [turn(served, each, each) for each in sessions]
    assert all(texts)
    before = [position(served, each) for each in sessions]
    killed = served.replicas()[0]
    os.kill(killed, signal.SIGKILL)

    def goes_on(session_id: str) -> bool:
        try:
            return position(served, session_id) >= 0 and bool(turn(served, session_id, session_id))
        except (AssertionError, httpx.TransportError):  # a 5xx of Ray's, until it has noticed
            return False

    for session_id, at in zip(sessions, before, strict=True):
        assert position_settled(served, session_id) == at
        eventually(lambda name=session_id: goes_on(name))
    eventually(lambda: len({*served.replicas()} - {killed}) == NUM_REPLICAS)
    eventually(lambda: num_alive(served) == NUM_REPLICAS)


def position_settled(served: Served, session_id: str) -> int:
    """Where a session is, asked until a replica answers."""
    found = []

    def is_told() -> bool:
        try:
            found.append(position(served, session_id))
        except (AssertionError, httpx.TransportError):
            return False
        return True

    eventually(is_told)
    return found[-1]

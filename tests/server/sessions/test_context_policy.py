"""Context policies over HTTP, by a real engine whose window is a few tokens."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cottention.engine.state.context_window import context_schedules
from cottention.server.config import ServerConfig
from cottention.server.generation.chat_template import find_template
from cottention.server.sessions.storage import open_sessions
from tests.engine.windows import engine_of
from tests.server.live import Live, eventually, serving

WINDOW = 16
TURN: dict[str, Any] = {"prompt": "", "max_tokens": 1, "ignore_eos": True, "seed": 1}
START = context_schedules(WINDOW)["renew"].start


@contextlib.contextmanager
def live_under(policy: str) -> Iterator[Live]:
    engine = engine_of(WINDOW, context_policy=policy)
    with contextlib.ExitStack() as stack:
        sessions = stack.enter_context(open_sessions(engine, ServerConfig()))
        template = find_template("plain", Path())
        yield stack.enter_context(serving(engine, template, sessions))


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_under("renew") as live:
        yield live


@pytest.fixture(scope="module")
def exact() -> Iterator[Live]:
    with live_under("exact") as live:
        yield live


def refusal(response: Any) -> tuple[int, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"] or error["param"]


def test_every_answer_tells_the_oldest_token_that_is_remembered(live: Live) -> None:
    body = {"prompt": [7] * 10, "max_tokens": 30, "ignore_eos": True, "seed": 1}
    [choice] = live.complete(**body).json()["choices"]
    assert choice["context_start"] == START(39) > 0
    *_, last, _ = live.events(**body)
    assert last["choices"][0]["context_start"] == START(39)
    [choice] = live.complete(**body, context_policy="exact").json()["choices"]
    assert choice["context_start"] == 0
    answer = live.chat("x", max_tokens=60, ignore_eos=True).json()
    held = answer["usage"]["total_tokens"]
    assert answer["choices"][0]["context_start"] == START(held - 1) > 0


@pytest.mark.parametrize("on_disconnect", ["cancel", "continue"])
def test_a_whole_turn_tells_it_whoever_ends_it(live: Live, on_disconnect: str) -> None:
    body = TURN | {"session_id": live.opened("abc"), "max_tokens": 40}
    answer = live.complete(**body, on_disconnect=on_disconnect).json()
    [choice] = answer["choices"]
    assert choice["context_start"] == answer["session"]["context_start"] > 0


def test_stored_events_are_those_that_were_sent(live: Live) -> None:
    """The last one is made before the turn is stored, and has what the session is after it."""
    session_id = live.opened("abc")
    body = TURN | {"session_id": session_id, "max_tokens": 40, "stream": True}
    sent = live.client.post("/v1/completions", json=body | {"on_disconnect": "continue"}).text
    assert f'"context_start":{START(42)},"durable":false' in sent
    eventually(lambda: live.session(session_id)["residence"] != "resident")
    assert live.client.get(f"/v1/sessions/{session_id}/events").text == sent


def test_a_session_tells_it_after_every_turn(live: Live) -> None:
    session_id = live.opened("abc")
    for _ in range(6):
        body = TURN | {"session_id": session_id, "max_tokens": 7}
        told = live.complete(**body).json()["session"]
        found = live.session(session_id)
        assert found["context_start"] == told["context_start"] == START(told["position"] - 1)
        assert found["context_policy"] == "renew"
    assert found["context_start"] > 0
    rewound = live.client.post(f"/v1/sessions/{session_id}/rewind").json()
    assert rewound["context_start"] == START(rewound["position"] - 1)


def test_no_prompt_is_too_long_and_all_of_it_is_counted(live: Live) -> None:
    answer = live.complete(prompt=[9] * 5000, max_tokens=2, ignore_eos=True).json()
    assert answer["usage"] == {
        "prompt_tokens": 5000,
        "completion_tokens": 2,
        "total_tokens": 5002,
        "prompt_tokens_details": None,
    }


def test_a_young_session_may_choose_and_an_old_one_may_not(live: Live) -> None:
    session_id = live.opened("", context_policy="exact")
    assert live.session(session_id)["context_policy"] == "exact"
    turn = TURN | {"session_id": session_id}
    live.complete(**turn | {"prompt": [5] * 4, "context_policy": "renew"})
    assert live.session(session_id)["context_policy"] == "renew"
    live.complete(**turn | {"context_policy": "exact", "max_tokens": WINDOW})
    assert live.session(session_id)["context_policy"] == "exact"
    refused = live.complete(**turn | {"context_policy": "renew"})
    assert refusal(refused) == (409, "context_policy_settled")
    assert live.complete(**turn).json()["session"]["context_start"] == 0
    assert live.complete(**turn | {"context_policy": "exact"}).is_success


def test_a_cut_turn_changes_the_policy_too(live: Live) -> None:
    session_id = live.opened("a")
    body = TURN | {"prompt": "b", "session_id": session_id, "max_tokens": 1_000_000}
    with live.connect(**body | {"context_policy": "exact"}, stream=True) as sock:
        received = b""
        while received.count(b'"text"') < 4:
            received += sock.recv(200)
    turn = live.complete(**TURN | {"session_id": session_id, "on_conflict": "wait"})
    assert turn.is_success
    assert live.session(session_id)["context_policy"] == "exact"


def test_a_policy_that_there_is_not(live: Live) -> None:
    for path in ("/v1/completions", "/v1/sessions"):
        answer = live.client.post(path, json={"prompt": "a", "context_policy": "both"})
        assert refusal(answer) == (400, "context_policy")


def test_a_server_without_spares_says_so(exact: Live, live: Live) -> None:
    for path in ("/v1/completions", "/v1/sessions"):
        for prompt in ("a", ""):
            wish = {"prompt": prompt or "b", "context_policy": "renew"}
            assert refusal(exact.client.post(path, json=wish)) == (400, "context_policy")
    assert refusal(exact.client.post("/v1/sessions", json={"context_policy": "renew"})) == (
        400,
        "context_policy",
    )
    session = exact.session(exact.opened("a"))
    assert session["context_policy"] == "exact"
    assert exact.complete(prompt="a", max_tokens=40, ignore_eos=True).is_success
    spares = [
        server.client.get("/v1/capacity").json()["bytes_per_session"]["spare"]
        for server in (exact, live)
    ]
    assert spares == [0, live.engine.spec.bytes_per_slot // 2]


def test_a_snapshot_keeps_its_policy(live: Live) -> None:
    for policy in ("renew", "exact"):
        session_id = live.opened("a", context_policy=policy)
        live.complete(**TURN | {"session_id": session_id, "max_tokens": 40})
        raw = live.client.get(f"/v1/sessions/{session_id}/snapshot").content
        moved = live.client.post("/v1/sessions/import", content=raw).json()
        told = live.session(session_id)
        for name in ("context_policy", "context_start", "position"):
            assert moved[name] == told[name]
        assert moved["context_policy"] == policy


def test_a_renewed_snapshot_is_of_no_use_without_spares(live: Live, exact: Live) -> None:
    """It is refused as a turn of it would be. A young one can still become exact."""
    session_id = live.opened([5] * 4)
    live.complete(**TURN | {"session_id": session_id, "max_tokens": WINDOW - 4})
    young = live.client.get(f"/v1/sessions/{session_id}/snapshot").content
    live.complete(**TURN | {"session_id": session_id})
    old = live.client.get(f"/v1/sessions/{session_id}/snapshot").content

    moved = exact.client.post("/v1/sessions/import", content=young).json()
    assert (moved["position"], moved["context_policy"]) == (WINDOW, "renew")
    turn = TURN | {"session_id": moved["id"]}
    in_a_turn = exact.complete(**turn)
    assert refusal(in_a_turn) == (400, "context_policy")
    assert 'a turn with "exact" would change it' in in_a_turn.json()["error"]["message"]
    assert exact.complete(**turn | {"context_policy": "exact"}).is_success

    before = exact.client.get("/v1/capacity").json()["stored_bytes"]
    refused = exact.client.post("/v1/sessions/import", content=old)
    assert refusal(refused) == (400, "context_policy")
    assert "would change it" not in refused.json()["error"]["message"]
    assert exact.client.get("/v1/capacity").json()["stored_bytes"] == before
    assert live.client.post("/v1/sessions/import", content=old).is_success

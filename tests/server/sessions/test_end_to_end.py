"""Turns of the real engine that are cut: what the session goes on with is what it says it holds."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cottention.engine.config import EngineConfig
from cottention.engine.engine import Engine
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.scheduling.context_policy import MAX_HELD
from cottention.engine.state.session_state import SessionState
from cottention.server.config import ServerConfig
from cottention.server.sessions.storage import open_sessions
from tests.engine.making import ATTENTIONS, SESSION_FAMILIES, model_folder
from tests.server.live import Live, eventually, serving

TOKENS: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True, "seed": 5}


@pytest.fixture(scope="module", params=[*ATTENTIONS, *SESSION_FAMILIES])
def gptj_folder(request: pytest.FixtureRequest) -> Path:
    """A small model of every kind whose states differ in more than their size."""
    return model_folder(request.param)


@pytest.fixture(scope="module")
def live(gptj_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    engine = Engine(gptj_folder, EngineConfig(max_slots=8))
    config = ServerConfig(session_dir=str(tmp_path_factory.mktemp("sessions")))
    with contextlib.ExitStack() as stack:
        sessions = stack.enter_context(open_sessions(engine, config))
        yield stack.enter_context(serving(engine, sessions=sessions))


@pytest.fixture(scope="module")
def solo(gptj_folder: Path) -> Engine:
    return Engine(gptj_folder, EngineConfig(max_slots=1))


def state_of(live: Live, session_id: str) -> SessionState:
    turn = live.sessions.begin("", session_id)
    live.sessions.abandon(turn)
    state: SessionState = turn.state
    return state


def said_after(solo: Engine, ids: tuple[int, ...]) -> str:
    """What one long request says after these ids."""
    solo.submit(ids, SamplingParams(**TOKENS), start=solo.policies.new_session(None))
    outputs = [out for _ in iter(solo.has_work, False) for out in solo.step()]
    return "".join(out.text for out in outputs)


@pytest.mark.parametrize("num_events", [1, 4, 9])
def test_a_cut_turn_goes_on_from_what_was_delivered(
    live: Live, solo: Engine, num_events: int
) -> None:
    session_id = live.opened("def f(x):")
    body = TOKENS | {"prompt": " return", "session_id": session_id, "max_tokens": 1_000_000}
    with live.connect(**body, stream=True) as sock:
        received = b""
        while received.count(b'"text"') < num_events:
            received += sock.recv(200)
    eventually(lambda: live.session(session_id)["residence"] != "resident")
    held = state_of(live, session_id)
    assert live.session(session_id)["position"] == held.num_tokens
    solo_ids = held.recent
    if held.num_tokens == len(solo_ids):  # or some are older than the window
        answer = live.complete(
            prompt="", session_id=session_id, on_conflict="wait", **TOKENS
        ).json()
        assert answer["choices"][0]["text"] == said_after(solo, solo_ids)


def test_an_absurd_age_is_refused_before_it_is_stored(live: Live, solo: Engine) -> None:
    codec, window = solo.session_codec(), solo.policies.window
    held = state_of(live, live.opened("def f(x):"))
    before = live.client.get("/v1/capacity").json()["stored_bytes"]
    for position in (MAX_HELD, 2**53, 2**62):
        old = replace(held, position=position, recent=(held.recent * window)[-window:])
        answer = live.client.post("/v1/sessions/import", content=codec.encode(old))
        assert answer.status_code == 400
        assert f"at most {MAX_HELD} tokens" in answer.json()["error"]["message"]
    assert live.client.get("/v1/capacity").json()["stored_bytes"] == before


def test_a_state_that_is_not_finite_is_not_stored(
    live: Live, solo: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An append sees no logits that could tell, and a turn's may be finite in spite of the rows."""
    session_id = live.opened("def f(x):")
    before = live.client.get(f"/v1/sessions/{session_id}/snapshot").content
    read = live.engine.pool.read

    def overflowing(row: int) -> tuple[torch.Tensor, ...]:
        *others, last = read(row)
        return (*others, last.index_fill(0, torch.tensor([0]), float("inf")))

    with monkeypatch.context() as patch:
        patch.setattr(live.engine.pool, "read", overflowing)
        body = {"prompt": " return", "session_id": session_id}
        refused = [
            live.client.post("/v1/sessions", json={"prompt": "def f(x):"}),
            live.client.post(f"/v1/sessions/{session_id}/append", json={"prompt": " return"}),
            live.complete(**body, **TOKENS),
        ]
        events = live.events(**body, **TOKENS)
    for answer in refused:
        assert answer.status_code == 500, answer.text
        assert answer.json()["error"]["code"] == "state_not_finite"
    assert events[-1]["error"]["code"] == "state_not_finite"
    assert live.client.get(f"/v1/sessions/{session_id}/snapshot").content == before
    answer = live.complete(prompt="", session_id=session_id, on_conflict="wait", **TOKENS).json()
    said = said_after(solo, tuple(solo.tokenizer.encode("def f(x):")))
    assert answer["choices"][0]["text"] == said


def test_many_short_turns_say_what_one_long_request_says(live: Live, solo: Engine) -> None:
    prompt = "def f(x):"
    session_id = live.opened(prompt)
    whole = said_after(solo, tuple(solo.tokenizer.encode(prompt)))
    parts = [
        live.complete(prompt="", session_id=session_id, **TOKENS | {"max_tokens": 3}).json()
        for _ in range(4)
    ]
    assert "".join(part["choices"][0]["text"] for part in parts) == whole
    assert [part["session"]["position"] for part in parts][-1] == live.session(session_id)[
        "position"
    ]


def test_a_turn_that_ends_at_a_stop_string_keeps_what_was_said(live: Live) -> None:
    session_id = live.opened("def f(x):")
    body = TOKENS | {"prompt": "", "session_id": session_id}
    twin = live.client.post(f"/v1/sessions/{session_id}/fork", json={}).json()["data"][0]["id"]
    text = live.complete(**body).json()["choices"][0]["text"]
    stop = text[2:4]
    answer = live.complete(**body | {"session_id": twin, "stop": stop}).json()
    assert answer["choices"][0]["text"] == text[: text.index(stop)]
    assert answer["session"]["position"] <= live.session(session_id)["position"]

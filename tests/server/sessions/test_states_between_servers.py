"""A client goes from server to server with its state: what it is told is what one server would say.

In float32 on a CPU, to the bit: states are compared by their bytes, log-probabilities as numbers.
"""

import base64
import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from cottention.engine.engine import Engine
from cottention.server.config import ServerConfig
from cottention.server.generation.chat_template import find_template
from cottention.server.sessions.storage import open_sessions
from tests.engine.making import ATTENTIONS, SESSION_FAMILIES
from tests.engine.windows import engine_of
from tests.server.live import Live, serving

WINDOW = 48
TURN: dict[str, Any] = {
    "ignore_eos": True,
    "seed": 5,
    "max_tokens": 9,
    "return_token_ids": True,
    "logprobs": 3,
}


class Workers:
    """Servers of one model, asked in turn, as behind a proxy that knows of no sessions."""

    def __init__(self, lives: list[Live]) -> None:
        self.lives = lives
        self._next = itertools.cycle(lives)

    def ask(self, path: str, **body: Any) -> Any:
        response: httpx.Response = next(self._next).client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()


@contextlib.contextmanager
def working(folder: Path, attention: str, num: int) -> Iterator[Workers]:
    with contextlib.ExitStack() as stack:

        def started(engine: Engine) -> Live:
            sessions = stack.enter_context(open_sessions(engine, ServerConfig()))
            template = find_template("plain", folder)
            return stack.enter_context(serving(engine, template, sessions))

        yield Workers([started(engine_of(WINDOW, attention)) for _ in range(num)])


@pytest.fixture(scope="module", params=[*ATTENTIONS, *SESSION_FAMILIES])
def workers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workers]:
    with working(tmp_path_factory.mktemp("model"), request.param, 2) as workers:
        yield workers


def recurrence(worker: Live, state: str) -> list[torch.Tensor]:
    """The rows of a state. Its counts of drawn ids tell prompts from answers."""
    found = worker.sessions.read_snapshot(base64.b64decode(state), lambda _: None)
    return list(found.rows)


def told_by(answer: Any) -> Any:
    """Ids and log-probabilities of a completion."""
    [choice] = answer["choices"]
    return choice["token_ids"], choice["logprobs"]


@pytest.mark.parametrize("num_turns", [2, 8])
def test_a_completion_says_what_one_with_all_tokens_says(workers: Workers, num_turns: int) -> None:
    """Eight turns go beyond the window, so that states are renewed on the way."""
    ids: list[int] = []
    state: dict[str, str] = {}
    for turn in range(num_turns):
        prompt = [40 + turn, 50 + turn, 60 + turn]
        asked = {"prompt": prompt, "return_state": True}
        answer = workers.ask("/v1/completions", **TURN | asked | state)
        state = {"state": answer["state"]}
        ids += prompt
        whole = workers.ask("/v1/completions", **TURN, prompt=ids, return_state=True)
        assert told_by(answer) == told_by(whole)
        ids += answer["choices"][0]["token_ids"]
        [worker, *_] = workers.lives
        found, expected = (recurrence(worker, each["state"]) for each in (answer, whole))
        assert all(map(torch.equal, found, expected))
    assert len(ids) == 12 * num_turns


def test_a_state_has_the_bytes_of_a_session_with_the_same_turns(workers: Workers) -> None:
    """Of chats too, rendered after a state as after a session: so do all that a session's chats
    promise hold."""
    [worker, other] = workers.lives
    session_id = worker.opened()
    state: dict[str, str] = {}
    turn = TURN | {"logprobs": True, "top_logprobs": 3}
    for text in ("import os\n", "class A:", "x = 1"):
        in_session = worker.chat(text, session_id=session_id, **turn).json()
        in_hand = other.chat(text, return_state=True, **turn | state).json()
        assert in_session["prompt_token_ids"] == in_hand["prompt_token_ids"]
        assert in_session["choices"] == in_hand["choices"]
        state = {"state": in_hand["state"]}
        snapshot = worker.client.get(f"/v1/sessions/{session_id}/snapshot").content
        assert base64.b64decode(in_hand["state"]) == snapshot


def test_states_become_sessions_and_sessions_states(workers: Workers) -> None:
    [worker, other] = workers.lives
    first = worker.complete(prompt="def f", return_state=True, **TURN).json()
    raw = base64.b64decode(first["state"])
    imported = other.client.post(
        "/v1/sessions/import", content=raw, headers={"content-type": "application/octet-stream"}
    ).json()
    in_session = other.complete(prompt="x", session_id=imported["id"], **TURN).json()
    in_hand = worker.complete(prompt="x", state=first["state"], **TURN).json()
    assert told_by(in_session) == told_by(in_hand)
    exported = other.client.get(f"/v1/sessions/{imported['id']}/snapshot").content
    branches = [
        worker.complete(prompt="y", state=base64.b64encode(exported).decode(), **TURN).json()
        for _ in range(2)
    ]
    assert told_by(branches[0]) == told_by(branches[1])


def test_a_prompt_that_was_read_alone_is_answered_as_one_that_was_sent(workers: Workers) -> None:
    prompt = list(range(40, 40 + WINDOW + 7))
    read = workers.ask("/v1/completions", prompt=prompt, max_tokens=0, return_state=True)
    assert read["usage"]["completion_tokens"] == 0
    answer = workers.ask("/v1/completions", **TURN, state=read["state"])
    assert told_by(answer) == told_by(workers.ask("/v1/completions", **TURN, prompt=prompt))


def test_a_stream_s_state_is_that_of_a_whole_answer(workers: Workers) -> None:
    [worker, _] = workers.lives
    asked = TURN | {"prompt": "x = ", "return_state": True}
    whole = worker.complete(**asked).json()
    *chunks, _ = worker.events(**asked)
    assert chunks[-1]["state"] == whole["state"]


def test_a_request_that_is_sent_again_gets_the_same_state(workers: Workers) -> None:
    """A client whose connection broke would else go on from a state of another answer."""
    [worker, _] = workers.lives
    asked = TURN | {"prompt": "x", "seed": None, "return_state": True}
    answers = [
        worker.client.post("/v1/completions", json=asked, headers={"Idempotency-Key": "state"})
        for _ in range(2)
    ]
    assert answers[0].content == answers[1].content
    assert answers[1].json()["state"]


def test_a_model_s_state_is_not_another_s(tmp_path: Path) -> None:
    with working(tmp_path, "cottention", 1) as some, working(tmp_path, "linear", 1) as others:
        [mine], [theirs] = some.lives, others.lives
        state = mine.complete(prompt="x", return_state=True).json()["state"]
        response = theirs.complete(prompt="x", state=state)
    assert (response.status_code, response.json()["error"]["code"]) == (409, "snapshot_mismatch")

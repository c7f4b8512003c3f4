"""kill -9 of a real server under load: what was answered is there, and goes on as a twin would.

COTTENTION_CRASH_ROUNDS says how many times with Cottention; CI takes a few, `make crash` two
hundred. What the other kinds keep has another shape, and denominators.
"""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest

from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.state.session_state import SessionState
from tests.engine.making import ATTENTIONS, SESSION_FAMILIES, model_folder
from tests.server.live import eventually
from tests.server.process import served
from tests.server.sse import read_told, text_of

pytestmark = pytest.mark.slow

ROUNDS = int(os.environ.get("COTTENTION_CRASH_ROUNDS", "3"))
NUM_SESSIONS = 32
NUM_TOKENS = 5
FLAGS = ("--max-slots", "40", "--session-memory", "256K")

Said = list[str]


def prompt_of(session: int, turn: int) -> str:
    return f"def f{session}(x{turn}): "


class Twins:
    """What every session says in each turn when nothing is ever interrupted."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._said = cache(self._next)

    def said(self, session: int, num_turns: int) -> Said:
        return [self._said(session, turn)[1] for turn in range(num_turns)]

    def num_tokens(self, session: int, num_turns: int) -> int:
        return self._said(session, num_turns - 1)[0].num_tokens if num_turns else 0

    def _next(self, session: int, turn: int) -> tuple[SessionState, str]:
        new = self._engine.policies.new_session(None)
        start = self._said(session, turn - 1)[0] if turn else new
        ids = self._engine.tokenizer.encode(prompt_of(session, turn))
        params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, seed=session)
        self._engine.submit(ids, params, start=start)
        outputs = [out for _ in iter(self._engine.has_work, False) for out in self._engine.step()]
        assert outputs[-1].state is not None
        return outputs[-1].state, "".join(out.text for out in outputs)


def body_of(name: str, session: int, turn: int) -> dict[str, Any]:
    body: dict[str, Any] = {"session_id": name, "prompt": prompt_of(session, turn)}
    return body | {"max_tokens": NUM_TOKENS, "ignore_eos": True, "seed": session}


def take_turn(client: httpx.Client, name: str, session: int, turn: int) -> str:
    answer = client.post("/v1/completions", json=body_of(name, session, turn))
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def take_turn_from_afar(client: httpx.Client, name: str, session: int, turn: int) -> str:
    """As a stream that is left after an event or two, and what came after them."""
    body = body_of(name, session, turn) | {"stream": True, "on_disconnect": "continue"}
    raw = ""
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            raw += f"{line}\n"
            if raw.count("\n\n") > session % 3:
                break
    told = read_told(raw)
    last = {"Last-Event-ID": told[-1].id}
    rest = client.get(f"/v1/sessions/{name}/events", headers=last)
    assert rest.status_code == (204 if told[-1].data == "[DONE]" else 200), rest.text
    told += read_told(rest.text)
    if told[-1].data != "[DONE]":
        raise httpx.ReadError("the end is missing")
    return text_of(told)


def load(client: httpx.Client, name: str, session: int, answered: Said) -> None:
    """Turn after turn until the server is gone; half the sessions have clients that come and go."""
    take = take_turn_from_afar if session % 2 else take_turn
    with contextlib.suppress(httpx.TransportError):
        while True:
            answered.append(take(client, name, session, len(answered)))


def under_load(client: httpx.Client, names: Sequence[str], answered: Sequence[Said]) -> Any:
    threads = [
        threading.Thread(target=load, args=(client, name, session, answered[session]))
        for session, name in enumerate(names)
    ]
    for thread in threads:
        thread.start()
    return threads


def check(client: httpx.Client, twins: Twins, names: Sequence[str], answered: list[Said]) -> None:
    """Nothing answered is lost; a turn that was not may be there whole, or not at all.

    One that goes on without its client is followed to its end first.
    """
    for session, name in enumerate(names):
        said = answered[session]
        events = client.get(f"/v1/sessions/{name}/events") if session % 2 else None
        assert said == twins.said(session, len(said))
        position = client.get(f"/v1/sessions/{name}").json()["position"]
        possible = [twins.num_tokens(session, len(said) + more) for more in (0, 1)]
        assert position in possible, (session, position, possible)
        if position == possible[1] != possible[0]:
            said.append(twins.said(session, len(said) + 1)[-1])
        if events is not None and said:
            assert text_of(read_told(events.text)) == said[-1]


def kill_and_look(model: Path, num_rounds: int, folder: Path) -> None:
    twins = Twins(Engine(model, EngineConfig(max_slots=1)))
    answered: list[Said] = [[] for _ in range(NUM_SESSIONS)]
    names: list[str] = []
    chance = random.Random(0)
    for _ in range(num_rounds):
        with served(model, folder, *FLAGS) as (popen, client):
            if not names:
                opened = [client.post("/v1/sessions", json={}) for _ in answered]
                names = [each.json()["id"] for each in opened]
            check(client, twins, names, answered)
            least = sum(map(len, answered)) + 2
            threads = under_load(client, names, answered)
            time.sleep(chance.uniform(0.1, 1.2))
            eventually(lambda least=least: sum(map(len, answered)) >= least)
            popen.send_signal(signal.SIGKILL)
            for thread in threads:
                thread.join()
    with served(model, folder, *FLAGS) as (_, client):
        check(client, twins, names, answered)
        for session, name in enumerate(names):
            turn = len(answered[session])
            assert take_turn(client, name, session, turn) == twins.said(session, turn + 1)[-1]
    assert sum(map(len, answered)) > num_rounds


@pytest.mark.timeout(60 * ROUNDS + 60)
def test_kill_9_loses_nothing_answered(gptj_folder: Path, tmp_path: Path) -> None:
    kill_and_look(gptj_folder, ROUNDS, tmp_path / "sessions")


def test_nor_with_another_attention(tmp_path: Path) -> None:
    """Each killed once, all at the same time: most of it is servers that start."""
    others = [*(kind for kind in ATTENTIONS if kind != "cottention"), *SESSION_FAMILIES]
    models = [model_folder(each) for each in others]
    with ThreadPoolExecutor() as pool:
        looks = [pool.submit(kill_and_look, each, 1, tmp_path / each.name) for each in models]
        for look in looks:
            look.result()

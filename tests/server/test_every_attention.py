"""A session's whole life over HTTP, by real engines of every kind of attention and every family.

The window is a few tokens, so that states are renewed all the time; recurrent families renew none.
Whatever happens to a session, it says what a fresh request of all its ids says.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cottention.engine import Engine, SamplingParams
from cottention.engine.models.gptj.attention_kinds import RECURRENT_KINDS
from cottention.server.config import ServerConfig
from cottention.server.sessions.storage import open_sessions
from tests.engine.making import FAMILIES
from tests.engine.windows import engine_of
from tests.server.live import Live, serving

pytestmark = pytest.mark.no_cover

WINDOW = 16
TURN: dict[str, Any] = {"ignore_eos": True, "seed": 5}
each_kind = pytest.mark.parametrize("attention", RECURRENT_KINDS)


@contextlib.contextmanager
def keeping(attention: str, folder: Path) -> Iterator[Live]:
    """A server over sessions in a folder, on an engine of its own: as after a restart."""
    engine = engine_of(WINDOW, attention)
    with contextlib.ExitStack() as stack:
        kept = open_sessions(engine, ServerConfig(session_dir=str(folder)))
        yield stack.enter_context(serving(engine, sessions=stack.enter_context(kept)))


@dataclass
class Twin:
    """A session, and the ids that it should hold after each of its turns."""

    id: str
    ids: list[list[int]] = field(default_factory=lambda: [[]])

    def says(self, solo: Engine, prompt: Sequence[int], num: int) -> list[int]:
        """What a request of all ids says that has never been a session."""
        params = SamplingParams(max_tokens=num, **TURN)
        solo.submit([*self.ids[-1], *prompt], params, start=solo.policies.new_session(None))
        outputs = [out for _ in iter(solo.has_work, False) for out in solo.step()]
        return [i for out in outputs for i in out.token_ids]


def take_turn(
    live: Live, solo: Engine, twin: Twin, prompt: list[int], num: int, *, stream: bool = False
) -> None:
    body = TURN | {"prompt": prompt, "session_id": twin.id, "max_tokens": num}
    body |= {"return_token_ids": True}
    if stream:
        *events, done = live.events(**body)
        assert done == "[DONE]"
        choices = [choice for event in events for choice in event["choices"]]
        position = events[-1]["session"]["position"]
    else:
        answer = live.complete(**body).json()
        choices, position = answer["choices"], answer["session"]["position"]
    said = [i for choice in choices for i in choice["token_ids"]]
    assert said == twin.says(solo, prompt, num)
    twin.ids.append([*twin.ids[-1], *prompt, *said])
    assert position == len(twin.ids[-1])


def forked(live: Live, twin: Twin) -> Twin:
    [made] = live.client.post(f"/v1/sessions/{twin.id}/fork", json={}).json()["data"]
    return Twin(made["id"], [*twin.ids])


def rewind(live: Live, twin: Twin) -> None:
    twin.ids.pop()
    told = live.client.post(f"/v1/sessions/{twin.id}/rewind").json()
    assert told["position"] == len(twin.ids[-1])


def snapshot(live: Live, twin: Twin) -> bytes:
    return live.client.get(f"/v1/sessions/{twin.id}/snapshot").content


def imported(live: Live, raw: bytes, twin: Twin) -> Twin:
    """A session that is what `twin` was, with no turn to go back to."""
    answer = live.client.post("/v1/sessions/import", content=raw)
    assert answer.status_code == 200, answer.text
    return Twin(answer.json()["id"], [twin.ids[-1]])


@pytest.mark.parametrize("attention", [*RECURRENT_KINDS, *FAMILIES])
def test_a_session_s_life(attention: str, tmp_path: Path) -> None:
    """Opened, continued, forked, rewound, moved, parked, stored, and continued after a restart."""
    solo = engine_of(WINDOW, attention)
    with keeping(attention, tmp_path) as live:
        first = Twin(live.opened([7, 8, 9]), [[7, 8, 9]])
        take_turn(live, solo, first, [], 4)
        take_turn(live, solo, first, [11, 12], 15, stream=True)  # past the first renewal
        fork = forked(live, first)
        take_turn(live, solo, fork, [13], 20)
        take_turn(live, solo, first, [], 1)
        rewind(live, first)
        rewind(live, first)
        take_turn(live, solo, first, list(range(20, 60)), 5, stream=True)
        assert live.session(first.id)["residence"] == "parked"
        raw, moved_from = snapshot(live, first), Twin(first.id, [first.ids[-1]])
        moved = imported(live, raw, moved_from)
        assert snapshot(live, moved) == raw
        take_turn(live, solo, moved, [14], 3)
        take_turn(live, solo, first, [15], 3)
    with keeping(attention, tmp_path) as live:
        assert live.session(fork.id)["residence"] == "stored"
        for twin in (first, fork, moved, imported(live, raw, moved_from)):
            take_turn(live, solo, twin, [16], WINDOW, stream=True)
        rewind(live, fork)
        rewind(live, fork)
        take_turn(live, solo, fork, [], 2)
        assert live.client.delete(f"/v1/sessions/{fork.id}").status_code == 200


@each_kind
def test_a_snapshot_of_another_kind_is_refused(attention: str, tmp_path: Path) -> None:
    """Of models with the same weights, but for what belongs to their kinds."""
    with keeping(attention, tmp_path / "here") as live:
        raw = snapshot(live, Twin(live.opened("abc")))
    other = next(kind for kind in RECURRENT_KINDS if kind != attention)
    with keeping(other, tmp_path / "there") as live:
        answer = live.client.post("/v1/sessions/import", content=raw)
        assert answer.status_code == 409
        assert answer.json()["error"]["code"] == "snapshot_mismatch"


@each_kind
def test_exact_past_the_window(attention: str, tmp_path: Path) -> None:
    """cosFormer's M is the window here, and a turn that would go past it changes nothing."""
    body = TURN | {"prompt": "", "max_tokens": WINDOW}
    with keeping(attention, tmp_path) as live:
        session_id = live.opened("abc", context_policy="exact")
        before = live.session(session_id)["position"]
        answer = live.complete(session_id=session_id, **body)
        if attention != "cosformer":
            assert answer.json()["session"] == live_session(live, session_id)
            assert answer.json()["session"]["position"] == before + WINDOW
            return
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "max_tokens"
        assert live.session(session_id)["position"] == before
        renewed = live.complete(session_id=session_id, **body, context_policy="renew")
        assert renewed.json()["session"]["position"] == before + WINDOW


def live_session(live: Live, session_id: str) -> dict[str, Any]:
    """As an answer tells it."""
    found = live.session(session_id)
    return {name: found[name] for name in ("id", "position", "context_start", "durable")}

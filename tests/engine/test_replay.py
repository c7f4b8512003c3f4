"""A turn that another process has begun: with its ids and its seed it goes on as undisturbed."""

import json
from typing import Any

import pytest

from cottention.engine.engine import Engine
from cottention.engine.outputs import Output
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.state.session_state import SessionState
from cottention.engine.structured_output import TextStructure

NUM_TOKENS = 40
PARAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "penalties": {"frequency_penalty": 0.7, "presence_penalty": 0.3, "repetition_penalty": 1.2},
    "repetitions": {"dry_multiplier": 1.5, "dry_allowed_length": 1},
    "bad words": {"bad_words": ("ab", "c"), "min_tokens": 9},
    "a grammar": {
        "structured": TextStructure(
            "json_schema", json.dumps({"type": "array", "items": {"type": "integer"}})
        )
    },
}


def params_of(name: str, **more: Any) -> SamplingParams:
    fields = {"max_tokens": NUM_TOKENS, "seed": 3} | PARAMS[name] | more
    return SamplingParams(ignore_eos="structured" not in fields, **fields)


def run(engine: Engine) -> list[Output]:
    return [out for _ in iter(engine.has_work, False) for out in engine.step()]


def ids_of(outputs: list[Output]) -> list[int]:
    return [token_id for out in outputs for token_id in out.token_ids]


def text_of(outputs: list[Output]) -> str:
    return "".join(out.text for out in outputs)


def begun(engine: Engine, num_ids: int) -> SessionState:
    """A session after a turn."""
    params = SamplingParams(max_tokens=5, ignore_eos=True, seed=1)
    prompt = [n % 200 for n in range(num_ids)]
    engine.submit(prompt, params, start=engine.policies.new_session(None))
    state = run(engine)[-1].state
    assert state is not None
    return state


def undisturbed(engine: Engine, start: SessionState, params: SamplingParams) -> list[Output]:
    engine.submit([7, 8, 9], params, start=start)
    return run(engine)


def replayed(
    engine: Engine, start: SessionState, params: SamplingParams, ids: list[int]
) -> list[Output]:
    engine.submit([7, 8, 9], params, start=start, replayed=ids)
    return run(engine)


def same_state(one: SessionState | None, other: SessionState | None) -> bool:
    """All of it, rows bit by bit."""
    assert one is not None
    assert other is not None
    assert all((a == b).all() for a, b in zip(one.rows, other.rows, strict=True))
    rest = [
        (each.position, each.pending, each.recent, each.counts, each.undecoded, each.context_policy)
        for each in (one, other)
    ]
    assert rest[0] == rest[1]
    return True


@pytest.mark.every_session
@pytest.mark.parametrize("num_ids", [3, 300])
def test_it_goes_on_as_undisturbed(engine: Engine, num_ids: int) -> None:
    """After any of its ids: in text, ids and the bits of its state, across renewals too."""
    start, params = begun(engine, num_ids), params_of("plain")
    alone = undisturbed(engine, start, params)
    for num in (1, 17, NUM_TOKENS - 1):
        again = replayed(engine, start, params, ids_of(alone)[:num])
        assert ids_of(again[:1]) == ids_of(alone)[:num]
        assert ids_of(again) == ids_of(alone)
        assert text_of(again) == text_of(alone)
        assert same_state(again[-1].state, alone[-1].state)


@pytest.mark.parametrize("name", PARAMS)
def test_what_its_sampling_remembers_is_remembered(engine: Engine, name: str) -> None:
    start, params = begun(engine, 4), params_of(name)
    alone = undisturbed(engine, start, params)
    num = len(ids_of(alone)) // 2
    again = replayed(engine, start, params, ids_of(alone)[:num])
    assert ids_of(again) == ids_of(alone)
    assert again[-1].finish_reason is alone[-1].finish_reason


def test_text_that_is_held_back_stays_so(engine: Engine) -> None:
    """A stop string that begins in the replayed part and ends after it ends the turn."""
    start = begun(engine, 4)
    text = text_of(undisturbed(engine, start, params_of("plain")))
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    params = params_of("plain", stop=(stop,))
    alone = undisturbed(engine, start, params)
    for num in range(1, len(ids_of(alone))):
        again = replayed(engine, start, params, ids_of(alone)[:num])
        assert text_of(again) == text_of(alone)
        assert again[-1].stop_reason == stop
        # what is told of these ids is what was told of them before
        assert again[0].text == text_of(alone[:num])

"""Sessions stored as the ids that their states follow from: as if the states had been stored.

COTTENTION_RECIPE_SESSIONS is how many random sessions of each attention and family there are.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cottention.engine import Engine, EngineConfig, Output, SamplingParams
from cottention.engine.errors import NonFiniteStateError, SnapshotError, StateTooLargeError
from cottention.engine.state.session_state import SessionState
from tests.engine.making import FAMILIES

NUM_SESSIONS = {"cottention": 200, **dict.fromkeys(FAMILIES, 24)}
"""Fewer of those whose state differs in its features alone (40) and of other families, unless
COTTENTION_RECIPE_SESSIONS says how many."""


def turn(
    engine: Engine, start: SessionState, ids: Sequence[int], params: SamplingParams
) -> tuple[SessionState, list[int]]:
    [(state, said)] = turns(engine, [(start, ids, params)])
    return state, said


def turns(
    engine: Engine, wanted: Sequence[tuple[SessionState, Sequence[int], SamplingParams]]
) -> list[tuple[SessionState, list[int]]]:
    """Turns of several sessions at once: state and ids after each."""
    names = [engine.submit(ids, params, start=start) for start, ids, params in wanted]
    outputs: dict[str, list[Output]] = {name: [] for name in names}
    while engine.has_work():
        for out in engine.step():
            outputs[out.request_id].append(out)
    done = []
    for name in names:
        state = outputs[name][-1].state
        assert state is not None
        done.append((state, [token_id for out in outputs[name] for token_id in out.token_ids]))
    return done


@pytest.fixture
def engine(gptj_folder: Path) -> Engine:
    """Its batches are small, so that prompts are cut into chunks in many ways."""
    return Engine(gptj_folder, EngineConfig(max_slots=8, max_batch_tokens=64))


@pytest.mark.slow
@pytest.mark.every_model
@pytest.mark.timeout(1800 if "COTTENTION_RECIPE_SESSIONS" in os.environ else 300)
def test_a_recipe_goes_on_as_the_stored_state_does(engine: Engine, attention: str) -> None:
    """Random sessions, each twice: with its whole states, and with what every turn's recipe says.

    Turns of all lengths, over several renewals where the family has them; ids and the bytes of the
    snapshots are equal.
    """
    assert engine.has_one_arithmetic
    rng = random.Random(attention)
    whole, recipes = engine.session_codec(), engine.session_codec(writes_recipes=True)
    window = engine.policies.window
    num_shorter = 0
    num_sessions = os.environ.get("COTTENTION_RECIPE_SESSIONS", NUM_SESSIONS.get(attention, 40))
    for _ in range(int(num_sessions)):
        kept = lean = engine.policies.new_session(None)
        for _ in range(rng.randint(1, 3)):
            num_new = rng.choice([1, 3, rng.randint(1, window), rng.randint(1, window)])
            ids = [rng.randrange(3, engine.tokenizer.num_ids) for _ in range(num_new)]
            params = SamplingParams(
                max_tokens=rng.choice([0, 1, 5, 17]),
                ignore_eos=True,
                seed=rng.randrange(1000),
                temperature=rng.choice([0.0, 1.0]),
            )
            (kept, said), (lean, said_again) = turns(
                engine, [(kept, ids, params), (lean, ids, params)]
            )
            assert said == said_again
            assert whole.encode(kept) == whole.encode(lean)
            raw = recipes.encode(lean)
            if kept.context_policy == "renew" or kept.num_tokens <= window:
                num_shorter += len(raw) < len(whole.encode(kept))
                assert not recipes.decode(raw).rows
            lean = recipes.decode(raw)
            assert recipes.encode(lean) == raw
            kept = whole.decode(whole.encode(kept))
    assert num_shorter


def renewed(engine: Engine) -> SessionState:
    """A session that has forgotten its first ids."""
    window = engine.policies.window
    ids = [5 + n % 90 for n in range(2 * window + 7)]
    start = engine.policies.new_session("renew")
    state, _ = turn(engine, start, ids, SamplingParams(max_tokens=4, ignore_eos=True, seed=3))
    return state


def test_a_turn_that_is_cut_after_a_recipe_is_a_recipe_again(engine: Engine) -> None:
    """Also where whole states are written: its rows have never been computed."""
    window = engine.policies.window
    whole, recipes = engine.session_codec(), engine.session_codec(writes_recipes=True)
    kept = renewed(engine)
    lean = whole.decode(recipes.encode(kept))
    cut, lean_cut = (each.extended([7, 8], [9, 10], window) for each in (kept, lean))
    lean_cut = whole.decode(whole.encode(lean_cut))
    assert len(lean_cut.pending) == window
    assert lean_cut.num_tokens == cut.num_tokens
    params = SamplingParams(max_tokens=9, ignore_eos=True, seed=4)
    (one, said), (two, said_again) = turns(engine, [(cut, [], params), (lean_cut, [], params)])
    assert said == said_again
    assert whole.encode(one) == whole.encode(two)


def test_nothing_is_read_where_nothing_is_added(engine: Engine) -> None:
    """Whatever the place of the last id in its context: the ids before it need not be kept."""
    recipes = engine.session_codec(writes_recipes=True)
    state = renewed(engine)
    for _ in range(engine.policies.window):
        lean = recipes.decode(recipes.encode(state))
        after, _ = turn(engine, lean, [], SamplingParams(max_tokens=0))
        assert recipes.encode(after) == recipes.encode(lean)
        state, _ = turn(engine, state, [9], SamplingParams(max_tokens=0))


def test_a_long_exact_session_is_stored_whole(engine: Engine) -> None:
    recipes = engine.session_codec(writes_recipes=True)
    window = engine.policies.window
    start = engine.policies.new_session("exact")
    params = SamplingParams(max_tokens=2, ignore_eos=True, seed=3)
    short, _ = turn(engine, start, [5] * (window - 2), params)
    assert not recipes.decode(recipes.encode(short)).rows
    long, _ = turn(engine, short, [5], params)
    assert recipes.decode(recipes.encode(long)).rows
    limited = engine.session_codec(writes_recipes=True, max_encoded=len(recipes.encode(long)) - 1)
    limited.encode(short)
    with pytest.raises(StateTooLargeError, match="--max-stored-state"):
        limited.encode(long)


def test_what_is_no_recipe_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = engine.session_codec(writes_recipes=True)
    state = renewed(engine).recipe()
    assert state is not None
    with pytest.raises(SnapshotError, match="a position and no state"):
        codec.decode(codec.encode(replace(state, context_policy="exact")))
    for pending in (state.pending[1:], (*state.pending, 5)):
        bad = replace(state, position=state.num_tokens - len(pending), pending=pending)
        with monkeypatch.context() as patch:
            patch.setattr(codec, "stored_form", lambda state: state)
            raw = codec.encode(bad)
        with pytest.raises(SnapshotError):
            codec.decode(raw)


def test_a_state_that_is_not_finite_is_not_stored_as_a_recipe_either(engine: Engine) -> None:
    codec = engine.session_codec(writes_recipes=True)
    state = renewed(engine)
    state.rows[0].view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteStateError):
        codec.encode(state)

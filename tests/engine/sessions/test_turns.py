"""Sessions in the engine: split turns, cuts and restores continue as one long request would."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from cottention.engine import Engine, FinishReason, Output, SamplingParams
from cottention.engine.errors import ParameterError
from cottention.engine.state.session_state import SessionState

pytestmark = pytest.mark.every_session

WINDOW = 16
"""n_positions of the small model is larger; what is kept is told by the engine itself."""

SEEDED = SamplingParams(max_tokens=6, ignore_eos=True, seed=11)


def turn(
    engine: Engine,
    start: SessionState,
    ids: Sequence[int],
    params: SamplingParams,
    beside: Sequence[Sequence[int]] = (),
) -> tuple[SessionState, list[Output]]:
    """One turn to its end, with other requests running beside it."""
    name = engine.submit(ids, params, start=start)
    for prompt in beside:
        engine.submit(prompt, replace(SEEDED, seed=5, max_tokens=9))
    outputs = [out for out in drained(engine) if out.request_id == name]
    assert outputs[-1].state is not None
    return outputs[-1].state, outputs


def empty(engine: Engine) -> SessionState:
    """A session of no tokens, under the engine's own policy."""
    return engine.policies.new_session(None)


def drained(engine: Engine) -> list[Output]:
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    assert engine.pool.num_free == engine.pool.num_slots
    return outputs


def ids_of(outputs: Sequence[Output]) -> list[int]:
    return [token_id for out in outputs for token_id in out.token_ids]


def whole(engine: Engine, ids: Sequence[int], num: int) -> list[int]:
    """What a request without a session says to all ids at once, with the same seed."""
    [completion] = engine.generate([ids], replace(SEEDED, max_tokens=num))
    return list(completion.token_ids)


def test_turns_of_any_length_are_one_long_answer(engine: Engine) -> None:
    prompt = list(range(40, 61))
    expected = whole(engine, prompt, 18)
    for lengths in ([18], [6, 6, 6], [1] * 18, [5, 13]):
        state, told = empty(engine), []
        for num in lengths:
            ids = prompt if not state.num_tokens else []
            state, outputs = turn(engine, state, ids, replace(SEEDED, max_tokens=num), [[1, 2]] * 3)
            told += ids_of(outputs)
        assert told == expected
        assert state.num_tokens == len(prompt) + 18
        assert state.position == state.num_tokens - 1
        assert state.recent == (*prompt, *expected)


def test_prompts_in_pieces_are_one_prompt(engine: Engine) -> None:
    prompt = list(range(30, 60))
    expected = whole(engine, prompt, 6)
    reads = replace(SEEDED, max_tokens=0)
    for cuts in ([1], [1, 2, 3], [29], [10, 20]):
        state = empty(engine)
        for first, last in zip([0, *cuts], cuts, strict=False):
            state, outputs = turn(engine, state, prompt[first:last], reads)
            assert ids_of(outputs) == []
            assert state.pending == (prompt[last - 1],)
        _, outputs = turn(engine, state, prompt[cuts[-1] :], SEEDED)
        assert ids_of(outputs) == expected


def test_a_cut_turn_holds_what_was_delivered_and_nothing_else(engine: Engine) -> None:
    prompt = list(range(20, 33))
    expected = whole(engine, prompt, 12)
    first, _ = turn(engine, empty(engine), prompt, replace(SEEDED, max_tokens=4))
    for num_delivered in range(5):
        cut = first.extended((), expected[4 : 4 + num_delivered], WINDOW)
        assert cut.position == first.position
        _, outputs = turn(engine, cut, [], replace(SEEDED, max_tokens=12 - 4 - num_delivered))
        assert ids_of(outputs) == expected[4 + num_delivered :]


def test_forks_share_chance_under_a_seed_alone(engine: Engine) -> None:
    state, _ = turn(engine, empty(engine), [3, 4, 5], SEEDED)
    again = [ids_of(turn(engine, state, [], SEEDED)[1]) for _ in range(2)]
    assert again[0] == again[1]
    unseeded = replace(SEEDED, seed=None, max_tokens=30)
    assert len({tuple(ids_of(turn(engine, state, [], unseeded)[1])) for _ in range(3)}) == 3


def test_a_turn_does_not_touch_the_value_it_began_with(engine: Engine) -> None:
    state, _ = turn(engine, empty(engine), [3, 4, 5], SEEDED)
    before = [row.clone() for row in state.rows]
    turn(engine, state, [9, 9], SEEDED)
    assert all(row.equal(old) for row, old in zip(state.rows, before, strict=True))


def test_penalties_count_what_earlier_turns_said(engine: Engine) -> None:
    params = replace(SEEDED, frequency_penalty=2.0, repetition_penalty=1.3)
    prompt = list(range(7, 19))
    _, outputs = turn(engine, empty(engine), prompt, replace(params, max_tokens=12))
    state, first = turn(engine, empty(engine), prompt, replace(params, max_tokens=5))
    _, second = turn(engine, state, [], replace(params, max_tokens=7))
    assert ids_of(first) + ids_of(second) == ids_of(outputs)
    assert sum(state.counts.values()) == 5
    assert state.counts.keys() == {*prompt, *ids_of(first)}


def test_a_stop_token_and_a_stop_string_stay_in_the_session(engine: Engine) -> None:
    prompt = [3, 4, 5, 6]
    expected = whole(engine, prompt, 6)
    stops = replace(SEEDED, stop_token_ids=(expected[2],), max_tokens=6)
    state, outputs = turn(engine, empty(engine), prompt, stops)
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert state.recent[-1] == expected[2]
    assert state.num_tokens == len(prompt) + expected.index(expected[2]) + 1


def test_half_a_character_waits_for_the_next_turn(engine: Engine) -> None:
    table = engine.tokenizer.token_bytes
    whole_text = "".join(
        out.text for out in turn(engine, empty(engine), [7], replace(SEEDED, max_tokens=40))[1]
    )
    state, told = empty(engine), ""
    for _ in range(40):
        state, outputs = turn(
            engine, state, [] if state.num_tokens else [7], replace(SEEDED, max_tokens=1)
        )
        told += "".join(out.text for out in outputs)
        assert len(state.undecoded) < 4
    assert told == whole_text
    said = b"".join(table[token_id] for token_id in state.recent[1:])
    assert told == said.removesuffix(state.undecoded).decode(errors="replace")


def test_a_cancelled_turn_tells_no_state(engine: Engine) -> None:
    name = engine.submit([1, 2], replace(SEEDED, max_tokens=100), start=empty(engine))
    engine.step()
    engine.cancel(name)
    assert [out.state for out in drained(engine)] == [None]


def test_an_empty_session_needs_a_prompt(engine: Engine) -> None:
    with pytest.raises(ParameterError, match="at least one token"):
        engine.submit([], SEEDED, start=empty(engine))


@pytest.mark.parametrize(("field", "value"), [("n", 2), ("prompt_logprobs", 1)])
def test_a_session_has_one_future(engine: Engine, field: str, value: int) -> None:
    with pytest.raises(ParameterError) as caught:
        engine.submit([1], replace(SEEDED, **{field: value}), start=empty(engine))
    assert caught.value.param == field

"""States that are renewed: what is said follows from the ids and their indices, and nothing else.

The plain definition: the id at `index` is computed in the state of ids start(index):index, read
anew. Whatever the engine does, its log-probabilities have the bits of that.
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cottention.engine import Engine, SamplingParams
from cottention.engine.errors import ContextPolicyError, ParameterError
from cottention.engine.scheduling.prefill_stops import CacheUse
from cottention.engine.state.context_window import (
    ExactSchedule,
    RenewalSchedule,
    context_schedules,
    prefill_spans,
)
from cottention.engine.state.session_state import SessionState
from tests.engine.execution.test_cuda_graphs import captured_on_cpu
from tests.engine.making import ATTENTIONS
from tests.engine.windows import (
    PARAMS,
    Told,
    drain,
    engine_of,
    rivals_by_definition,
    say,
    told,
    turn,
)

WINDOW = 16
WITHOUT_END = [kind for kind in ATTENTIONS if kind != "cosformer"]
"""Kinds that go past the window under `exact`, too: cosFormer's M is the window here."""


def ids_from(seed: int, num: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(5, 200) for _ in range(num)]


def check(
    window: int, prompt: Sequence[int], drawn: Sequence[Told], attention: str = "cottention"
) -> None:
    """Each id was drawn from what the definition says."""
    ids = [*prompt, *(token_id for token_id, _ in drawn)]
    last_known = range(len(prompt) - 1, len(ids) - 1)
    grid = context_schedules(window)["renew"]
    expected = rivals_by_definition(grid, ids, last_known, window, attention)
    for index, (_, logprob), rivals in zip(last_known, drawn, expected, strict=True):
        assert logprob.top == rivals, index


# The grid


@st.composite
def grids_of_any_size(draw: st.DrawFn) -> RenewalSchedule:
    kept = draw(st.integers(1, 40))
    return RenewalSchedule(draw(st.integers(2 * kept, 200)), kept)


@settings(deadline=None)
@given(grids_of_any_size())
def test_nothing_changes_while_a_context_is_steady(grid: RenewalSchedule) -> None:
    """What the scheduler does not look at again until then."""
    index = 0
    for _ in range(8):
        until = grid.steady_until(index)
        for each in range(index, until):
            assert grid.start(each) == grid.start(index)
            assert grid.ahead(each, 10**9) is None
        is_steady = grid.ahead(until, 10**9) is None and grid.start(until) == grid.start(index)
        assert not is_steady
        index = max(until, index + 1)
    assert ExactSchedule().steady_until(index) > 2**60


@settings(deadline=None)
@given(grids_of_any_size())
def test_the_grid_is_a_walk_from_boundary_to_boundary(grid: RenewalSchedule) -> None:
    start, boundary = 0, grid.window
    for index in range(5 * grid.window):
        if index == boundary:
            start, boundary = index - grid.kept, index + grid.window - grid.kept
        assert grid.start(index) == start
        assert 0 <= index - start < grid.window
        is_ahead = index >= boundary - grid.kept
        assert grid.ahead(index, boundary) == (boundary - grid.kept if is_ahead else None)
        assert grid.ahead(index, boundary - 1) is None


@settings(deadline=None)
@given(grids_of_any_size(), st.integers(1, 900))
def test_windows_compute_every_id_once(grid: RenewalSchedule, stop: int) -> None:
    windows = grid.windows(stop)
    assert [i for w in windows for i in range(w.first, w.stop)] == list(range(stop))
    assert all(grid.start(i) == w.start for w in windows for i in range(w.first, w.stop))


@settings(deadline=None)
@given(grids_of_any_size(), st.integers(0, 500), st.integers(1, 500), st.integers(0, 300))
def test_reads_bring_both_rows_to_where_they_should_be(
    grid: RenewalSchedule, held: int, more: int, max_tokens: int
) -> None:
    stop = held + more
    last = stop + max_tokens - 2
    *spare, main = prefill_spans(grid, held, stop, last, is_scored=False)
    assert (main.start, main.stop) == (grid.start(stop - 1), stop)
    assert main.begin in (main.start, held)
    if main.begin > main.start:
        assert grid.start(held - 1) == main.start
    assert (spare == []) == (grid.ahead(stop - 1, last) is None)
    assert len(spare) == 0 or (spare[0].start, spare[0].stop) == (spare[0].begin, stop)
    assert stop - main.begin <= grid.window


def test_exact_never_forgets() -> None:
    grid = ExactSchedule()
    assert grid.start(10**9) == 0
    assert grid.ahead(10**9, 10**10) is None
    assert grid.windows(70) == [(0, 0, 70)]


# Bits


@pytest.mark.every_attention
@pytest.mark.parametrize("window", [2, 3, 5, 16])
def test_a_stream_has_the_bits_of_the_definition(window: int, attention: str) -> None:
    engine = engine_of(window, attention)
    for length in (1, window - 1, window, window + 1, 3 * window + 2):
        prompt = ids_from(length, length)
        check(window, prompt, say(engine, prompt, 2 * window + 8), attention)


@pytest.mark.every_attention
@pytest.mark.parametrize(
    ("max_slots", "budget"),
    [
        (16, 20),
        (3, 2),
        pytest.param(16, 512, marks=pytest.mark.slow),
        pytest.param(7, 5, marks=pytest.mark.slow),
    ],
)
def test_bits_do_not_depend_on_company(attention: str, max_slots: int, budget: int) -> None:
    """Many streams of all ages, under budgets that cut prompts and make running ones wait."""
    cases = [(ids_from(n, 1 + 3 * n), 25) for n in range(16)]
    engine = engine_of(WINDOW, attention, max_slots=max_slots, max_batch_tokens=budget)
    names = [engine.submit(p, replace(PARAMS, max_tokens=num)) for p, num in cases]
    outputs = drain(engine)
    assert [told(outputs, name) for name in names] == _alone(attention)


@pytest.mark.every_attention
def test_up_to_the_window_both_policies_have_the_same_bits(attention: str) -> None:
    engine = engine_of(WINDOW, attention)
    prompt = ids_from(1, 5)
    more = 10 if attention in WITHOUT_END else 0
    params = replace(PARAMS, max_tokens=WINDOW - 5 + more)
    drawn = []
    for policy in ("renew", "exact"):
        name = engine.submit(prompt, replace(params, context_policy=policy))
        drawn.append(told(drain(engine), name))
    renewed, exact = drawn
    assert renewed[: WINDOW - 5 + 1] == exact[: WINDOW - 5 + 1]
    assert (renewed != exact) == (attention in WITHOUT_END)


@pytest.mark.every_attention
def test_every_choice_is_renewed(attention: str) -> None:
    engine = engine_of(WINDOW, attention)
    for length in (3, 13, 14, 16, 27, 30):
        prompt = ids_from(length, length)
        name = engine.submit(prompt, replace(PARAMS, max_tokens=30, n=3))
        outputs = drain(engine)
        for choice in range(3):
            check(WINDOW, prompt, told(outputs, name, choice), attention)


def test_a_stream_that_ends_before_a_boundary_needs_no_spare() -> None:
    engine = engine_of(WINDOW)
    prompt = ids_from(3, WINDOW - 2)
    say(engine, prompt, 2)
    assert engine.stats().num_prompt_tokens == len(prompt)
    say(engine, prompt, 4)
    assert engine.stats().num_prompt_tokens == 2 * len(prompt) + 2


def test_a_prompt_reads_only_what_survives() -> None:
    engine = engine_of(WINDOW)
    say(engine, ids_from(4, 10_000), 1)
    assert engine.stats().num_prompt_tokens <= WINDOW


@pytest.mark.every_attention
def test_captured_steps_take_the_spare_rows_with_them(attention: str) -> None:
    prompts = [ids_from(n, 2 + 5 * n) for n in range(4)]
    plain, captured = engine_of(WINDOW, attention), engine_of(WINDOW, attention)
    captured._runner._captured = captured_on_cpu(captured._runner, captured.pool.num_rows)
    for prompt in prompts:
        assert say(captured, prompt, 40) == say(plain, prompt, 40)
    captured._runner._captured = captured_on_cpu(captured._runner, 3)  # too few rows for some steps
    names = [captured.submit(p, replace(PARAMS, max_tokens=40)) for p in prompts]
    outputs = drain(captured)
    assert [told(outputs, name) for name in names] == [say(plain, p, 40) for p in prompts]


@pytest.mark.every_attention
def test_a_fault_in_the_middle_of_a_renewal_leaves_the_others_alone(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(WINDOW, attention)
    prompt = ids_from(5, 13)
    expected = say(engine, prompt, 30)
    run = engine._runner.run
    engine.submit(prompt, replace(PARAMS, max_tokens=30))
    for _ in range(3):
        engine.step()
    with monkeypatch.context() as patched:
        patched.setattr(engine._runner, "run", lambda *_: 1 / 0)
        engine.step()
    assert engine._runner.run == run
    assert engine.pool.num_free == engine.pool.num_slots
    assert say(engine, prompt, 30) == expected


# Scores


@pytest.mark.every_attention
@pytest.mark.parametrize("budget", [512, 7, 2])
def test_prompts_are_scored_on_the_same_grid(budget: int, attention: str) -> None:
    engine = engine_of(WINDOW, attention, max_batch_tokens=budget)
    prompt = ids_from(9, 70)
    params = SamplingParams(max_tokens=0, prompt_logprobs=3)
    engine.submit(prompt, params)
    [scores] = [out.prompt_logprobs for out in drain(engine)]
    assert scores is not None
    assert scores[0] is None
    assert len(scores) == len(prompt)
    grid = context_schedules(WINDOW)["renew"]
    expected = rivals_by_definition(grid, prompt, range(len(prompt) - 1), WINDOW, attention)
    assert [score.top for score in scores if score is not None] == expected


@pytest.mark.every_attention
def test_a_scored_prompt_goes_on_like_any_other(attention: str) -> None:
    engine = engine_of(WINDOW, attention)
    for length in (15, 16, 17, 30, 61):
        prompt = ids_from(length, length)
        name = engine.submit(prompt, replace(PARAMS, max_tokens=20, prompt_logprobs=0))
        assert told(drain(engine), name) == say(engine, prompt, 20)


# Prompts that come again


@pytest.mark.every_attention
def test_warm_and_cold_answers_are_equal_at_any_length(attention: str) -> None:
    warm = engine_of(150, attention, max_batch_tokens=512)
    cold = engine_of(150, attention, prefix_cache_bytes=0)
    prompt = ids_from(1, 700)
    num_spared = 0
    for length in [*range(60, 700, 37), 666, 670, 690]:
        before = warm.stats().num_prompt_tokens
        assert say(warm, prompt[:length], 3, cache=CacheUse("a")) == say(cold, prompt[:length], 3)
        num_spared += length - (warm.stats().num_prompt_tokens - before)
    assert num_spared > 3000
    assert warm.stats().prefix_cache.num_hit > 0


@pytest.mark.parametrize("attention", WITHOUT_END)
def test_policies_do_not_share_what_was_read(attention: str) -> None:
    warm, cold = engine_of(40, attention), engine_of(40, attention, prefix_cache_bytes=0)
    conversation = ids_from(2, 30)
    for _ in range(4):
        for policy in ("renew", "exact"):
            params = replace(PARAMS, max_tokens=20, context_policy=policy)
            name = warm.submit(conversation, params, cache=CacheUse("a"))
            said = told(drain(warm), name)
            name = cold.submit(conversation, params)
            assert told(drain(cold), name) == said
        conversation += [token_id for token_id, _ in said]
        conversation += ids_from(len(conversation), 5)


# Sessions


@pytest.mark.every_attention
def test_turns_of_any_length_are_one_long_answer(attention: str) -> None:
    engine = engine_of(WINDOW, attention)
    prompt = ids_from(6, 10)
    expected = say(engine, prompt, 60)
    for lengths in ([60], [5, 1, 1, 1, 1, 51], [1] * 60, [13, 12, 12, 12, 11], [6, 54], [3, 57]):
        state, drawn = SessionState(), []
        for num in lengths:
            state, new = turn(engine, state, [] if state.num_tokens else prompt, num)
            drawn += new
        assert drawn == expected
        assert state.recent == (*prompt, *(i for i, _ in expected))[-WINDOW:]


@pytest.mark.every_attention
@settings(max_examples=10, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    num=st.integers(1, 20),
)
def test_prompts_in_pieces_are_one_prompt(attention: str, pieces: list[int], num: int) -> None:
    engine = _shared(attention)
    prompt = ids_from(sum(pieces), sum(pieces))
    state, done = SessionState(), 0
    for size in pieces:
        state, _ = turn(engine, state, prompt[done : done + size], 0, logprobs=None)
        done += size
    _, drawn = turn(engine, state, [], num)
    assert drawn == say(engine, prompt, num)


@pytest.mark.every_attention
def test_a_cut_turn_goes_on_from_what_was_delivered(attention: str) -> None:
    engine = engine_of(WINDOW, attention)
    prompt = ids_from(8, 11)
    expected = say(engine, prompt, 50)
    ids = [token_id for token_id, _ in expected]
    first, _ = turn(engine, SessionState(), prompt, 4)
    for delivered in (*range(3), *range(3, 40, 4)):
        cut = first.extended((), ids[4 : 4 + delivered], WINDOW)
        _, drawn = turn(engine, cut, [], 46 - delivered)
        assert drawn == expected[4 + delivered :]


@pytest.mark.parametrize("attention", WITHOUT_END)
def test_the_policy_is_settled_at_the_window(attention: str) -> None:
    engine = engine_of(WINDOW, attention)
    young, _ = turn(engine, SessionState(), ids_from(1, 5), WINDOW - 5)
    assert young.num_tokens == WINDOW
    exact, _ = turn(engine, young, [], 3, context_policy="exact")
    assert exact.context_policy == "exact"
    assert young.context_policy == "renew"
    for state, other in ((exact, "renew"), (turn(engine, young, [], 1)[0], "exact")):
        with pytest.raises(ContextPolicyError, match=f"cannot become '{other}'"):
            engine.submit([], replace(PARAMS, context_policy=other), start=state)
        turn(engine, state, [], 1, context_policy=state.context_policy)


def test_an_engine_without_spares_refuses_to_renew() -> None:
    engine = engine_of(WINDOW, context_policy="exact")
    assert engine.pool.num_rows == engine.pool.num_slots
    for start in (None, SessionState()):
        wish = replace(PARAMS, context_policy="renew" if start is None else None)
        whose = "must be" if start is None else "the session has"
        with pytest.raises(ParameterError, match=f"{whose}.*no spare rows") as caught:
            engine.submit([1], wish, start=start)
        assert caught.value.param == "context_policy"
    state, _ = turn(engine, SessionState(context_policy="exact"), [1, 2], 40)
    assert turn(engine, state, [], 3)[0].context_policy == "exact"


def test_cosformer_goes_past_its_length_renewed_and_not_otherwise() -> None:
    engine = engine_of(WINDOW, "cosformer")
    assert engine.policies.max_exact_length == WINDOW
    say(engine, ids_from(1, 3 * WINDOW), 40)
    fits = replace(PARAMS, max_tokens=6, context_policy="exact")
    engine.submit(ids_from(1, WINDOW - 6), fits)
    drain(engine)
    state, _ = turn(engine, SessionState(context_policy="exact"), [1, 2], WINDOW - 4)
    for ids, start, params, param in (
        (ids_from(1, WINDOW + 1), None, fits, "prompt"),
        (ids_from(1, WINDOW - 5), None, fits, "max_tokens"),
        ([1], state, replace(fits, max_tokens=2), "max_tokens"),
        ([1, 2, 3], state, replace(fits, max_tokens=0), "prompt"),
    ):
        with pytest.raises(ParameterError, match=f"at most {WINDOW} tokens") as caught:
            engine.submit(ids, params, start=start)
        assert caught.value.param == param


def test_outputs_say_what_is_remembered() -> None:
    engine, grid = engine_of(WINDOW), context_schedules(WINDOW)["renew"]
    for num in range(1, 60, 3):
        engine.submit([7, 8, 9], replace(PARAMS, max_tokens=num))
        assert drain(engine)[-1].context_start == grid.start(3 + num - 1)


@functools.cache
def _alone(attention: str) -> list[list[Told]]:
    """What 16 streams say, one after another."""
    engine = engine_of(WINDOW, attention)
    return [say(engine, ids_from(n, 1 + 3 * n), 25) for n in range(16)]


@functools.cache
def _shared(attention: str) -> Engine:
    return engine_of(WINDOW, attention)

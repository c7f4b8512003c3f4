"""DRY against its plain definition; and in an engine, alone, in company and in sessions."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cottention.engine import Engine, EngineConfig, Output, SamplingParams
from cottention.engine.errors import ParameterError
from cottention.engine.sampling.dry import MAX_REPEAT, BreakerIds, RepeatRules, Repeats
from cottention.engine.state.session_state import SessionState

NUM_IDS = 6
PROMPT = [5, 17, 120, 17, 9, 33]


def by_definition(
    ids: Sequence[int], params: SamplingParams, breakers: set[int], size: int
) -> dict[int, float]:
    """The penalty of each id, as the module's docstring has it."""
    h = list(ids)[-size:]
    found: dict[int, float] = {}
    for j in range(len(h) - 1):
        m = 0
        while m <= j and m < MAX_REPEAT and h[j - m] == h[-1 - m] and h[j - m] not in breakers:
            m += 1
        if m >= params.dry_allowed_length and h[j + 1] not in breakers:
            penalty = params.dry_multiplier * params.dry_base ** (m - params.dry_allowed_length)
            found[h[j + 1]] = max(found.get(h[j + 1], 0.0), penalty)
    return found


def rules_of(params: SamplingParams, breakers: set[int], window: int) -> RepeatRules:
    is_breaker = np.array([each in breakers for each in range(NUM_IDS)])
    rules = RepeatRules.of(params, is_breaker, window)
    assert rules is not None
    return rules


def told(repeats: Repeats) -> dict[int, float]:
    found = repeats.penalties()
    return (
        {}
        if found is None
        else dict(zip(found.ids.tolist(), found.penalties.tolist(), strict=True))
    )


IDS = st.lists(st.integers(0, 2) | st.integers(0, NUM_IDS - 1), max_size=30)


@given(
    IDS,
    IDS,
    st.integers(2, 12),
    st.integers(1, 3),
    st.sets(st.integers(0, NUM_IDS - 1), max_size=2),
)
def test_each_id_s_penalty(
    prompt: list[int], drawn: list[int], size: int, allowed: int, breakers: set[int]
) -> None:
    """Also where the window slides over what began before it."""
    params = SamplingParams(dry_multiplier=0.5, dry_base=2.0, dry_allowed_length=allowed)
    repeats = Repeats(rules_of(params, breakers, size), prompt)
    ids = list(prompt)
    for each in (None, *drawn):
        if each is not None:
            repeats.append(each)
            ids.append(each)
        assert told(repeats) == by_definition(ids, params, breakers, size)


def test_a_long_repetition_counts_as_the_longest() -> None:
    params = SamplingParams(dry_multiplier=1.0, dry_base=1.01)
    prompt = [0, 1, 2] * 100
    read, grown = (Repeats(rules_of(params, set(), 400), each) for each in (prompt, prompt[:1]))
    for each in prompt[1:]:
        grown.append(each)
    expected = {0: pytest.approx(1.01 ** (MAX_REPEAT - 2))}
    assert told(read) == expected
    assert told(grown) == expected


def test_no_penalty_is_infinite() -> None:
    params = SamplingParams(dry_multiplier=1e300, dry_base=1e300, dry_allowed_length=1)
    assert told(Repeats(rules_of(params, set(), 100), [0] * 50)) == {0: pytest.approx(1e30)}


def test_breakers_are_the_ids_that_spell_them() -> None:
    found = BreakerIds([b"a", b"\n", b" :b", "é".encode(), b"\xff:", b""]).find(("\n", ":", "é"))
    assert found.tolist() == [False, True, True, True, True, False]


@pytest.fixture(scope="module")
def engine(gptj_folder: Path) -> Engine:
    return Engine(gptj_folder, EngineConfig(max_slots=64, max_batch_tokens=64))


LOOPING = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
DRY = replace(LOOPING, dry_multiplier=0.8)


def ids_of(engine: Engine, params: SamplingParams, prompts: Sequence[Any] = (PROMPT,)) -> list[Any]:
    return [list(each.token_ids) for each in engine.generate(prompts, params)]


def test_a_loop_ends() -> None:
    """The model that ships repeats a line; a line break would be a breaker."""
    engine, prompts = Engine(config=EngineConfig(max_slots=1)), ["import os\n"]
    params = replace(DRY, max_tokens=150, dry_sequence_breakers=())
    [looping] = ids_of(engine, replace(LOOPING, max_tokens=150), prompts)
    [free] = ids_of(engine, params, prompts)
    assert longest_repetition(looping) > 50
    assert longest_repetition(free) < 15
    assert ids_of(engine, replace(params, dry_penalty_last_n=0), prompts) == [looping]


def longest_repetition(ids: Sequence[int]) -> int:
    return max(
        length
        for length in range(len(ids))
        if len({tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)})
        < len(ids) - length + 1
    )


def test_company_changes_nothing(engine: Engine) -> None:
    params = replace(DRY, temperature=1.2, seed=3, frequency_penalty=0.2)
    [alone] = ids_of(engine, params)
    others = [PROMPT[place % 5 :] for place in range(20)]
    assert ids_of(engine, params, [*others, PROMPT])[-1] == alone


def test_turns_of_a_session_are_one_text(engine: Engine) -> None:
    """A repetition reaches back into earlier turns."""
    params = replace(DRY, max_tokens=40)
    [whole] = ids_of(engine, params)
    state, drawn = SessionState(), []
    for num, prompt in ((3, PROMPT), (17, []), (20, [])):
        engine.submit(prompt, replace(params, max_tokens=num), start=state)
        outputs: list[Output] = []
        while engine.has_work():
            outputs += engine.step()
        drawn += [token_id for out in outputs for token_id in out.token_ids]
        [state] = [out.state for out in outputs if out.state is not None]
    assert drawn == whole


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dry_multiplier", -0.1),
        ("dry_base", 0.99),
        ("dry_allowed_length", 0),
        ("dry_penalty_last_n", -2),
        ("dry_sequence_breakers", ("",)),
        ("dry_sequence_breakers", ("a",) * 17),
    ],
)
def test_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field

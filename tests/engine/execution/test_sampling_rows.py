"""Rows of sampling parameters that live across steps: each choice keeps its own, wherever it is."""

import random
from typing import Any

import pytest

from cottention.engine.execution.sampling_rows import SamplingRows
from cottention.engine.sampling.topk_topp import SamplingMode, SamplingRow
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.scheduling.request import Choice
from tests.engine.making import make_request

KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"temperature": 0.7, "min_p": 0.1},
    {"top_k": 5},
    {"top_p": 0.5, "top_k": 9},
]


def some_choices(num: int, rng: random.Random) -> list[Choice]:
    """Of requests with one to three choices, whose seeds differ."""
    choices: list[Choice] = []
    while len(choices) < num:
        params = SamplingParams(n=rng.randint(1, 3), seed=len(choices), **rng.choice(KINDS))
        choices += make_request(str(len(choices)), [1, 2], params).choices
    return choices


@pytest.mark.parametrize("seed", range(10))
def test_rows_are_those_of_a_choice_alone(seed: int) -> None:
    """While choices come, go and change places; the number is that of (seed, choice, token)."""
    rng = random.Random(seed)
    choices, rows = some_choices(30, rng), SamplingRows()
    batch: list[Choice] = []
    for _ in range(40):
        if rng.random() < 0.7:
            batch = rng.sample(choices, rng.randint(0, 20))
        indices = [rng.randint(0, 2**52) for _ in batch]
        together = rows.of(batch, indices).copy()
        mode = SamplingMode.GREEDY
        for row, (choice, index) in enumerate(zip(batch, indices, strict=True)):
            expected = SamplingRow.of(choice.request.params)
            mode = max(mode, expected.mode)
            assert together[row, 1:].tolist() == list(expected[1:])
            if expected.mode is not SamplingMode.GREEDY:
                assert together[row].tolist() == SamplingRows().of([choice], [index])[0].tolist()
        assert rows.mode is mode


def test_a_list_that_is_changed_in_place_is_another_batch() -> None:
    """The rows keep their own list: one that grew would else look the same as before."""
    rows, choices = SamplingRows(), some_choices(3, random.Random(1))
    batch = choices[:2]
    assert len(rows.of(batch, [5, 6])) == 2
    batch.append(choices[2])
    assert len(rows.of(batch, [5, 6, 7])) == 3

"""Adjusting rows together against the plain definition, one row and one id at a time."""

import math
import random
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest
import torch

from cottention.engine.sampling.logits_processors import LogitsAdjustment, adjust_logits
from cottention.engine.sampling.token_constraints import TokenConstraints
from cottention.engine.sampling.token_history import TokenCounts
from cottention.engine.sampling_params import SamplingParams

VOCABULARY = 30


def defined(logits: list[float], one: LogitsAdjustment, never: Collection[int]) -> list[float]:
    """vLLM's order: what must not be sampled, bias, penalties."""
    params = one.params
    allowed = range(VOCABULARY) if params.allowed_token_ids is None else params.allowed_token_ids
    adjusted = [x if i in allowed and i not in never else -math.inf for i, x in enumerate(logits)]
    for i, bias in params.logit_bias.items():
        adjusted[i] += bias
    for i, times in zip(one.counts.ids, one.counts.times, strict=True):
        by = params.repetition_penalty
        adjusted[i] = adjusted[i] / by if adjusted[i] > 0 else adjusted[i] * by
        adjusted[i] -= params.frequency_penalty * times + params.presence_penalty * (times > 0)
    return adjusted


def some_adjustment(rng: random.Random) -> tuple[LogitsAdjustment, Collection[int]]:
    """An adjustment, and the ids that it forbids besides those that are not allowed."""

    def ids(most: int) -> list[int]:
        return rng.sample(range(VOCABULARY), rng.randint(1, most))

    params: dict[str, Any] = {}
    counts, masked = TokenCounts(), []
    if rng.random() < 0.3:
        params["allowed_token_ids"] = tuple(ids(20))
    if rng.random() < 0.3:
        params["logit_bias"] = {i: rng.uniform(-5, 5) for i in ids(9)}
    if rng.random() < 0.3:
        masked = ids(5)
    if rng.random() < 0.6:
        counts = TokenCounts(ids(20), {i: rng.randint(1, 9) for i in ids(9)})
        params |= rng.choice(
            [{"repetition_penalty": 1.5}, {"frequency_penalty": -0.5}, {"presence_penalty": 0.7}]
        )
    made, is_early = SamplingParams(**params), rng.random() < 0.5
    bad_words = [[i] for i in ids(3)] if rng.random() < 0.2 else []
    if rng.random() < 0.3:
        made = replace(made, min_tokens=1, stop_token_ids=tuple(ids(3)))
    constraints = TokenConstraints.of(made, VOCABULARY, (), bad_words)
    early = made.stop_token_ids if is_early and made.min_tokens else ()
    never = (*masked, *early, *(i for (i,) in bad_words))
    return LogitsAdjustment(made, counts, masked, constraints, is_early), never


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_rows_are_adjusted_as_defined(rows: int, seed: int) -> None:
    rng = random.Random(seed)
    logits = torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    wanted = {row: one for row in range(rows) if (one := some_adjustment(rng))[0]}
    expected = [
        defined(given, *wanted[row]) if row in wanted else given
        for row, given in enumerate(logits.tolist())
    ]
    adjust_logits(logits, {row: one for row, (one, _) in wanted.items()})
    torch.testing.assert_close(logits, torch.tensor(expected))


def test_a_row_gets_the_same_bits_in_any_company() -> None:
    rng = random.Random(1)
    logits = torch.randn(40, VOCABULARY, generator=torch.Generator().manual_seed(1))
    wanted = {row: some_adjustment(rng)[0] for row in range(40)}
    alone = [logits[row : row + 1].clone() for row in range(40)]
    for row, one in enumerate(alone):
        adjust_logits(one, {0: wanted[row]})
    adjust_logits(logits, wanted)
    assert torch.equal(logits, torch.cat(alone))


def test_counts_go_on() -> None:
    counts = TokenCounts([4, 5, 4], {5: 2, 7: 1})
    for token_id in (9, 4, 9):
        counts.add(token_id)
    assert dict(zip(counts.ids, counts.times, strict=True)) == {4: 1, 5: 2, 7: 1, 9: 2}
    assert len(counts) == 4
    assert not TokenCounts()


@pytest.mark.parametrize("penalty", [5e-324, 1e-38, 1e308])
def test_any_repetition_penalty_leaves_numbers(penalty: float) -> None:
    logits = torch.tensor([[3.0, -2.0, 0.0, 80.0, -torch.inf]])
    one = LogitsAdjustment(SamplingParams(repetition_penalty=penalty), TokenCounts(range(5)))
    adjust_logits(logits, {0: one})
    assert logits[0, :4].isfinite().all()
    assert logits[0, 4] == -torch.inf

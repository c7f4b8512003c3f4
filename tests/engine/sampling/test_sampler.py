"""The sampler against a plain, slow definition, one row at a time."""

import math
import random
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cottention.engine.ops import NO_INDEX
from cottention.engine.sampling.random_numbers import random_key, uniform
from cottention.engine.sampling.sampler import Sampler
from cottention.engine.sampling.topk_topp import SamplingRow, as_tensor
from cottention.engine.sampling_params import MAX_SEED, SamplingParams

VOCABULARY = 24
SAMPLEABLE = [i for i in range(VOCABULARY) if i not in (3, 23)]
JUST_BELOW_1 = math.nextafter(1.0, 0.0)

MANY_KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7},
    {"temperature": 3.0, "min_p": 0.2},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10_000},
    {"top_p": 0.5},
    {"top_p": 0.9, "top_k": 6},
    {"top_p": 0.8, "top_k": 9, "min_p": 0.05, "temperature": 1.3},
    {"min_p": 1.0},
    {"top_k": -1, "min_p": 0.0},
]


def sampler() -> Sampler:
    return Sampler(SAMPLEABLE, VOCABULARY, "cpu")


def some_logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def sample_all(
    logits: Tensor, rows: list[SamplingRow], by: Sampler | None = None
) -> list[int | None]:
    """The id that each row gets."""
    ids = (by or sampler()).sample(logits, as_tensor(rows), {}).ids.tolist()
    return [None if token_id == NO_INDEX else token_id for token_id in ids]


def row_of(params: dict[str, Any], number: float) -> SamplingRow:
    return SamplingRow.of(SamplingParams(**params), number)


def one(logits: Tensor, number: float = 0.5, **params: Any) -> int | None:
    """What one row gets."""
    return sample_all(logits.clone().view(1, -1), [row_of(params, number)])[0]


def number_of(seed: int, choice: int, token_index: int) -> float:
    """The random number of one token."""
    key = np.array([random_key(seed, choice)], dtype=np.uint64)
    return float(uniform(key, np.array([token_index], dtype=np.uint64))[0])


def defined(logits: Tensor, params: SamplingParams) -> dict[int, float]:
    """The definition: id → probability, after all filters, in float64."""
    scaled = {i: float(logits[i]) / params.temperature for i in SAMPLEABLE}
    top = max(scaled.values())
    weights = {i: math.exp(x - top) for i, x in scaled.items()}
    kept = {i: w for i, w in weights.items() if w >= params.min_p}
    ordered = sorted(kept, key=lambda i: (-kept[i], i))
    if params.top_k > 0:
        ordered = ordered[: params.top_k]
    total, so_far, nucleus = sum(kept[i] for i in ordered), 0.0, []
    for i in ordered:
        if nucleus and params.top_p < 1 and so_far >= params.top_p * total:
            break
        nucleus.append(i)
        so_far += kept[i]
    return {i: kept[i] / so_far for i in nucleus}


@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_the_likeliest_id_that_may_be_sampled(seed: int) -> None:
    logits = some_logits(1, seed)[0]
    logits[3] = 100.0
    assert one(logits, temperature=0) == max(SAMPLEABLE, key=lambda i: float(logits[i]))


@pytest.mark.parametrize("params", [kind for kind in MANY_KINDS if kind.get("temperature") != 0])
def test_distribution_is_the_defined_one(params: dict[str, Any]) -> None:
    """An even grid of random numbers gives each id its share, to within one point of the grid."""
    logits = some_logits(1, seed=7)[0]
    points = 2000
    inputs = [row_of(params, (i + 0.5) / points) for i in range(points)]
    counts = Counter(sample_all(logits.repeat(points, 1), inputs))
    expected = defined(logits, SamplingParams(**params))
    assert set(counts) <= set(expected)
    for token_id, share in expected.items():
        assert abs(counts[token_id] - share * points) <= 1.5


def test_random_numbers_of_many_seeds_give_the_distribution() -> None:
    """χ² over 4,000 seeds: 21 degrees of freedom, beyond 50 in 4 of 10,000 such tests."""
    logits = some_logits(1, seed=8)[0] / 2
    params = SamplingParams()
    inputs = [SamplingRow.of(params, number_of(seed, 0, 12)) for seed in range(4000)]
    counts = Counter(sample_all(logits.repeat(len(inputs), 1), inputs))
    expected = defined(logits, params)
    chi2 = sum((counts[i] - 4000 * p) ** 2 / (4000 * p) for i, p in expected.items())
    assert chi2 < 50


@pytest.mark.parametrize("seed", range(4))
def test_a_row_does_not_depend_on_other_rows(seed: int) -> None:
    """Greedy, sorted and unsorted rows in any company and order get what they get alone."""
    rng = random.Random(seed)
    rows = [rng.choice(MANY_KINDS) for _ in range(40)]
    logits = some_logits(40, seed)
    inputs = [row_of(params, rng.random()) for params in rows]
    alone = [sample_all(logits[i : i + 1].clone(), inputs[i : i + 1])[0] for i in range(40)]
    order = rng.sample(range(40), 40)
    together = sample_all(logits[order], [inputs[i] for i in order])
    assert together == [alone[i] for i in order]


@pytest.mark.parametrize("number", [0.0, 1e-300, 0.5, JUST_BELOW_1])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1e-4},
        {"temperature": 1e-5},
        {"temperature": 1e30},
        {"temperature": 1e39},
        {"temperature": 1e308},
        {"top_k": 2**31 - 1},
        {"top_p": 1e-12},
        {"top_p": 5e-324},
        {"top_p": 5e-324, "top_k": 1, "temperature": 1e30},
        {"top_p": 1 - 1e-16, "top_k": 2},
        {"min_p": 1.0, "temperature": 1e39},
        {"min_p": 1e-300, "top_p": 0.999999},
    ],
)
def test_extremes_draw_an_allowed_id(params: dict[str, Any], number: float) -> None:
    assert one(some_logits(1, seed=3)[0], number, **params) in SAMPLEABLE


def test_extreme_parameters_keep_their_meaning() -> None:
    logits = some_logits(1, seed=3)[0]
    likeliest = one(logits, temperature=0)
    for params in ({"temperature": 1e-4}, {"top_p": 1e-12}, {"top_p": 5e-324}, {"min_p": 1.0}):
        assert one(logits, JUST_BELOW_1, **params) == likeliest
    hot = {one(logits, (i + 0.5) / 22, temperature=1e39) for i in range(22)}
    assert hot == set(SAMPLEABLE)


def test_impossible_ids_are_never_drawn_at_the_edges_of_the_numbers() -> None:
    """The first and the last id have no likelihood: the lowest and highest numbers miss them."""
    logits = torch.zeros(VOCABULARY)
    logits[0] = logits[22] = -1000.0
    assert one(logits, 0.0) == 1
    assert one(logits, JUST_BELOW_1) == 21


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_k": 3}])
def test_logits_that_are_not_finite_are_an_error(value: float, params: dict[str, Any]) -> None:
    logits = some_logits(1)[0]
    logits[5] = value
    assert one(logits, **params) is None


@pytest.mark.parametrize(
    ("key", "number"),
    [
        ((0, 0, 0), 0.13870941014555427),
        ((1, 2, 3), 0.4175580595044027),
        ((-1, 0, 17), 0.7021798904806315),
        ((9223372036854775807, 127, 1000000000), 0.12903436785439504),
        ((-9223372036854775808, 5, 4503599627370496), 0.5597124992576158),
    ],
)
def test_random_numbers_are_what_they_were(key: tuple[int, int, int], number: float) -> None:
    """Else a request with a seed would get another answer after an update."""
    assert number_of(*key) == number


def test_random_numbers_of_a_batch_are_those_of_its_rows() -> None:
    keys = [(seed, choice, 100 + seed) for seed in range(-3, 40) for choice in (0, 7)]
    together = uniform(
        np.array([random_key(seed, choice) for seed, choice, _ in keys], dtype=np.uint64),
        np.array([index for _, _, index in keys], dtype=np.uint64),
    )
    assert together.tolist() == [number_of(*key) for key in keys]


def test_uniform_is_a_function_of_its_arguments() -> None:
    assert number_of(1, 2, 3) == number_of(1, 2, 3)
    near = {number_of(*key) for key in [(1, 2, 3), (1, 3, 2), (2, 1, 3), (1, 2, 4), (0, 3, 3)]}
    assert len(near) == 5


def test_uniform_takes_any_int64_and_stays_below_one() -> None:
    seeds = [0, 1, -1, MAX_SEED, -MAX_SEED - 1, *range(2, 2000)]
    assert all(0 <= number_of(seed, 127, 10**9) < 1 for seed in seeds)


@pytest.mark.parametrize("axis", range(3))
def test_uniform_spreads_along_each_argument(axis: int) -> None:
    """Even counts in 16 bins (χ², 15 degrees) and no relation between neighbours."""
    keys = [[7, 0, 100] for _ in range(8000)]
    for place, key in enumerate(keys):
        key[axis] += place
    numbers = [number_of(*key) for key in keys]
    counts = Counter(int(number * 16) for number in numbers)
    assert sum((counts[i] - 500) ** 2 / 500 for i in range(16)) < 40
    centred = [number - 0.5 for number in numbers]
    correlation = sum(a * b for a, b in pairwise(centred)) * 12 / 8000
    assert abs(correlation) < 0.05


def test_all_in_a_row_of_equals_is_the_first() -> None:
    """Ties do not depend on how many rows or how wide a vocabulary there is."""
    for rows in (1, 2, 17):
        wide = Sampler(range(1, 5000), 5000, "cpu")
        inputs = [row_of({"temperature": 0}, 0.5)] * rows
        assert sample_all(torch.zeros(rows, 5000), inputs, wide) == [1] * rows

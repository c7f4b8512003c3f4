"""Random sampling: temperature, min_p, top_k, top_p, and one random number for each row.

Tensor operations that never wait for the device, so that a CUDA graph can hold them; `ops.sample`
is the same for the CPU, row by row. No row is sorted: what top_k and top_p keep is above a
threshold, which is found digit by digit. A row's id depends on its own logits and parameters alone.

Letters: R rows, N vocabulary.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor

from cottention.engine import ops

if TYPE_CHECKING:
    from cottention.engine.sampling_params import SamplingParams

_MIN_TEMPERATURE = torch.finfo(torch.float32).tiny
_MAX_TEMPERATURE = torch.finfo(torch.float32).max
"""Temperatures are clamped to these: beyond, they are 0 or infinite in float32."""

_MAX_INT32 = 2**31 - 1
_ALL = 2.0**62
"""More than any number of ids, and than any sum of amounts."""

_DIGIT_BITS = 8
_NUM_DIGITS = 2**_DIGIT_BITS


class SamplingMode(IntEnum):
    """How a row is sampled, cheapest first. A more expensive mode gives the same id."""

    GREEDY = 0
    RANDOM = 1
    """With temperature and min_p."""
    TOP_K_TOP_P = 2
    """Also with top_k and top_p, for which thresholds are searched."""


_MAX_IDS = {SamplingMode.RANDOM: 2**26, SamplingMode.TOP_K_TOP_P: 2**23}
"""Most ids, of all rows, that are computed together."""

_BYTES_PER_ID = {SamplingMode.RANDOM: 24, SamplingMode.TOP_K_TOP_P: 64}
"""What each of them takes in temporary tensors, at most."""


def sampling_bytes(num_ids: int) -> int:
    """Bytes that `sample_ids` takes at most for logits of so many ids, of all rows together."""
    return max(min(num_ids, _MAX_IDS[mode]) * size for mode, size in _BYTES_PER_ID.items())


class SamplingRow(NamedTuple):
    """Sampling parameters of one row; temperature 0 is greedy, `uniform` is in [0, 1)."""

    uniform: float
    temperature: float
    min_p: float
    top_k: int
    top_p: float

    @classmethod
    def of(cls, params: "SamplingParams", uniform: float = 0.0) -> Self:
        """What a request's parameters say."""
        temperature = 0.0 if params.is_greedy else params.temperature
        return cls(uniform, temperature, params.min_p, params.top_k, params.top_p)

    @property
    def mode(self) -> SamplingMode:
        """The cheapest mode that is enough."""
        if self.temperature == 0:
            return SamplingMode.GREEDY
        is_filtered = self.top_k > 0 or self.top_p < 1
        return SamplingMode.TOP_K_TOP_P if is_filtered else SamplingMode.RANDOM


GREEDY_ROW = SamplingRow(0.0, 0.0, 0.0, 0, 1.0)


def as_tensor(rows: Sequence[SamplingRow]) -> Tensor:
    """Float64 [R, 5], on the CPU; every value is exact."""
    return torch.tensor(rows, dtype=torch.float64).view(-1, len(GREEDY_ROW))


def sample_each(logits: Tensor, argmax_ids: Tensor, sampling_rows: Tensor) -> Tensor:
    """As `sample_ids`, each row in its own mode; sampling_rows float64 [R, 5] on the CPU."""
    _, temperature, _, top_k, top_p = sampling_rows.unbind(1)
    is_random = temperature != 0
    if not is_random.any():
        return argmax_ids
    if ops.can_sample(logits):
        return ops.sample(logits, argmax_ids, sampling_rows)
    is_filtered = is_random & ((top_k > 0) | (top_p < 1))
    ids = argmax_ids.clone()
    for mode, is_chosen in (
        (SamplingMode.RANDOM, is_random & ~is_filtered),
        (SamplingMode.TOP_K_TOP_P, is_filtered),
    ):
        if is_chosen.any():
            rows = is_chosen.nonzero().squeeze(-1)
            chosen, rows = sampling_rows[rows].to(logits.device), rows.to(logits.device)
            ids[rows] = sample_ids(logits[rows], argmax_ids[rows], chosen, mode)
    return ids


def sample_ids(
    logits: Tensor, argmax_ids: Tensor, sampling_rows: Tensor, mode: SamplingMode
) -> Tensor:
    """An id for each row, int64 [R], in a mode that is enough for every row.

    logits float32 [R, N], −∞ for masked ids; argmax_ids int64 [R], negative where no id can be
    sampled, and then returned as it is; sampling_rows float64 [R, 5].
    """
    if mode is SamplingMode.GREEDY:
        return argmax_ids
    num_rows = max(1, _MAX_IDS[mode] // logits.shape[-1])
    parts = zip(logits.split(num_rows), sampling_rows.split(num_rows), strict=True)
    sampled = torch.cat([_random_sample(*part, mode) for part in parts])
    is_random = (argmax_ids >= 0) & (sampled >= 0) & (sampling_rows[:, 1] != 0)
    return torch.where(is_random, sampled, argmax_ids)


def _random_sample(logits: Tensor, sampling_rows: Tensor, mode: SamplingMode) -> Tensor:
    uniform, temperature, min_p, top_k, top_p = sampling_rows.unsqueeze(-1).unbind(1)
    weights = _weights(logits, temperature, min_p)
    if mode is SamplingMode.TOP_K_TOP_P:
        keys = _keys(logits)
        weights = _apply_top_p(_apply_top_k(weights, keys, top_k), keys, top_p)
    return _invert_cdf(weights, uniform)


def _weights(logits: Tensor, temperature: Tensor, min_p: Tensor) -> Tensor:
    """Probabilities after temperature, relative to the largest: [R, N]; 0 where below min_p."""
    temperature = temperature.clamp(_MIN_TEMPERATURE, _MAX_TEMPERATURE).to(logits.dtype)
    weights = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).exp()
    return weights.masked_fill(weights < min_p.to(weights.dtype), 0)


def _keys(logits: Tensor) -> Tensor:
    """Whole numbers in the order of the logits, equal where these are: int64 [R, N], below 2³²."""
    bits = (logits + 0.0).view(torch.int32)  # no −0
    return (bits ^ ((bits >> 31) & _MAX_INT32)).long() + (_MAX_INT32 + 1)


def _apply_top_k(weights: Tensor, keys: Tensor, top_k: Tensor) -> Tensor:
    """0 for all but the first top_k ids in descending order of the logits, equal ones by id.

    By logits, because high temperatures make weights equal.
    """
    wanted = torch.where(top_k > 0, top_k, _ALL).long()
    threshold, above = _threshold(keys, torch.ones_like(keys), wanted)
    return _keep(weights, keys, threshold, wanted - above)


def _apply_top_p(weights: Tensor, keys: Tensor, top_p: Tensor) -> Tensor:
    """0 for all but the fewest ids, in the same order, that reach top_p of the sum; at least one.

    Weights are summed as multiples of a power of two, which no order of summation changes. Those
    below 2⁻²² lose the bits that a sum of float64 would lose beside the largest, which is 1.
    """
    unit = 2.0 ** (62 - weights.shape[-1].bit_length())
    amounts = (weights.double() * unit).round_().long()
    total = amounts.sum(dim=-1, keepdim=True)
    wanted = torch.where(top_p < 1, (top_p * total).ceil().clamp_min(1), _ALL).long()
    threshold, above = _threshold(keys, amounts, wanted)
    each = amounts.masked_fill(keys != threshold, 0).amax(dim=-1, keepdim=True).clamp_min(1)
    return _keep(weights, keys, threshold, (wanted - above + each - 1) // each)


def _threshold(keys: Tensor, amounts: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The key at which the amounts of the largest keys reach what is wanted, and those above it.

    keys int64 [R, N]; amounts int64 [R, N], from 0; wanted int64 [R, 1], from 1. The key is 0 where
    all amounts together do not reach it. Both results are int64 [R, 1]. It is found digit by digit,
    from the sums of the amounts by digit: no row is sorted.
    """
    key, above = torch.zeros_like(wanted), torch.zeros_like(wanted)
    for shift in range(32 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        others = (keys >> (shift + _DIGIT_BITS)) != key
        digits = (keys >> shift) & (_NUM_DIGITS - 1)
        sums = amounts.new_zeros(len(keys), _NUM_DIGITS)
        sums.scatter_add_(1, digits, amounts.masked_fill(others, 0))
        larger = sums.sum(dim=-1, keepdim=True) - sums.cumsum(dim=-1)
        digit = _NUM_DIGITS - (above + larger < wanted).sum(dim=-1, keepdim=True)
        digit = digit.clamp_max(_NUM_DIGITS - 1)  # amounts that are not numbers
        key = (key << _DIGIT_BITS) | digit
        above = above + larger.gather(-1, digit)
    return key, above


def _keep(weights: Tensor, keys: Tensor, threshold: Tensor, num_equal: Tensor) -> Tensor:
    """0 below the threshold, and for all but the first num_equal ids that are at it: [R, N]."""
    is_equal = keys == threshold
    is_excess = is_equal & (is_equal.cumsum(dim=-1, dtype=torch.int32) > num_equal)
    return weights.masked_fill((keys < threshold) | is_excess, 0)


def _invert_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """Ids at which each row's cumulative distribution, in the order of ids, passes `uniform`.

    int64 [R]; −1 where rounding leads to an id of weight 0: sums that a device takes in parallel
    can fall by a bit from one id to the next.
    """
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    total = sums[:, -1:]
    below = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))  # rounding
    ids = torch.searchsorted(sums, below, right=True).clamp(max=weights.shape[-1] - 1)
    return ids.masked_fill(weights.gather(-1, ids) <= 0, -1).squeeze(-1)

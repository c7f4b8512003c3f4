"""Random sampling: temperature, min_p, top_k, top_p, and one random number for each row.

Tensor operations that never wait for the device, so that a CUDA graph can hold them; `ops.draw` is
the same for the CPU, row by row. A row's id depends on its own logits and parameters alone.

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

_MAX_SORTED_ROWS = 64
"""Rows that are sorted together; sorting takes some thirty bytes for each id of each row."""


class SamplingMode(IntEnum):
    """How a row is sampled, cheapest first. A more expensive mode gives the same id."""

    GREEDY = 0
    RANDOM = 1
    """With temperature and min_p."""
    TOP_K_TOP_P = 2
    """Also with top_k and top_p, for which ids are sorted."""


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
    parts = zip(logits.split(_MAX_SORTED_ROWS), sampling_rows.split(_MAX_SORTED_ROWS), strict=True)
    sampled = torch.cat([_random_sample(*part, mode) for part in parts])
    is_random = (argmax_ids >= 0) & (sampled >= 0) & (sampling_rows[:, 1] != 0)
    return torch.where(is_random, sampled, argmax_ids)


def _random_sample(logits: Tensor, sampling_rows: Tensor, mode: SamplingMode) -> Tensor:
    uniform, temperature, min_p, top_k, top_p = sampling_rows.unsqueeze(-1).unbind(1)
    weights = _weights(logits, temperature, min_p)
    if mode is SamplingMode.TOP_K_TOP_P:
        weights = _apply_top_k_top_p(weights, logits, top_k, top_p)
    return _invert_cdf(weights, uniform)


def _weights(logits: Tensor, temperature: Tensor, min_p: Tensor) -> Tensor:
    """Probabilities after temperature, relative to the largest: [R, N]; 0 where below min_p."""
    temperature = temperature.clamp(_MIN_TEMPERATURE, _MAX_TEMPERATURE).to(logits.dtype)
    weights = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).exp()
    return weights.masked_fill(weights < min_p.to(weights.dtype), 0)


def _apply_top_k_top_p(weights: Tensor, logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """0 for all but the first top_k ids, and of these all but the fewest that reach top_p.

    Ordered by logits, because high temperatures make weights equal.
    """
    ids = logits.sort(dim=-1, descending=True, stable=True).indices
    ordered = weights.gather(-1, ids)
    rank = torch.arange(weights.shape[-1], device=weights.device)
    ordered = ordered.masked_fill((top_k > 0) & (rank >= top_k), 0)
    sums = ordered.cumsum(dim=-1, dtype=torch.float64)
    is_reached = (sums - ordered >= top_p * sums[:, -1:]) & (top_p < 1)
    ordered = ordered.masked_fill(is_reached & (rank > 0), 0)  # a tiny top_p rounds to 0
    return torch.zeros_like(weights).scatter(-1, ids, ordered)


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

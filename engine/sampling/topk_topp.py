"""Logits to ids by chance: temperature, min_p, top_k, top_p, and one random number a row.

Owns the arithmetic, in tensors alone: it waits for no device, so that a graph may hold it. The
compiled op for the CPU does the same, a row at a time. What a row gets depends on its own logits
and wishes, never on the rows beside it or on what those want.

Letters: R rows, N vocabulary.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from cottention.engine import ops

_COLDEST, _HOTTEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
"""Temperatures beyond are taken as these: in float32 they are 0 or infinite, 0 / 0 and −∞ / ∞."""

_ROWS_AT_ONCE = 64
"""Sorting takes some thirty bytes for each id of each row."""


class SamplingMode(IntEnum):
    """How an id is drawn, cheapest first. A dearer way gives a row the same id as its own."""

    LIKELIEST = 0
    FROM_ALL = 1
    """By likelihood, after temperature and min_p."""
    FROM_FIRST = 2
    """The same, after top_k and top_p, which want ids in the order of their likelihood."""


class SamplingRow(NamedTuple):
    """What one row wants. `uniform` in [0, 1) decides; temperature 0 asks for the likeliest id."""

    uniform: float
    temperature: float
    min_p: float
    top_k: int
    top_p: float

    @property
    def way(self) -> SamplingMode:
        """The cheapest that does it."""
        if self.temperature == 0:
            return SamplingMode.LIKELIEST
        return (
            SamplingMode.FROM_FIRST if self.top_k > 0 or self.top_p < 1 else SamplingMode.FROM_ALL
        )


GREEDY_ROW = SamplingRow(0.0, 0.0, 0.0, 0, 1.0)


def as_tensor(wishes: Sequence[SamplingRow]) -> Tensor:
    """Float64 [R, 5], on the CPU; every value of a wish is exact in it."""
    return torch.tensor(wishes, dtype=torch.float64).view(-1, len(GREEDY_ROW))


def draw_each(logits: Tensor, likeliest: Tensor, wishes: Sequence[SamplingRow]) -> Tensor:
    """An id for each row as `draw_ids` draws it, each by its own way: sorting is dear in torch."""
    ways = [wish.way for wish in wishes]
    if all(way is SamplingMode.LIKELIEST for way in ways):
        return likeliest
    if ops.can_sample(logits):
        return ops.sample(logits, likeliest, as_tensor(wishes))
    ids = likeliest.clone()
    for way in set(ways):
        rows = [row for row, each in enumerate(ways) if each is way]
        wanted = as_tensor([wishes[row] for row in rows]).to(logits.device)
        ids[rows] = draw_ids(logits[rows], likeliest[rows], wanted, way)
    return ids


def draw_ids(logits: Tensor, likeliest: Tensor, wishes: Tensor, way: SamplingMode) -> Tensor:
    """An id for each row, int64 [R], by a way that is at least as dear as any row's own.

    logits float32 [R, N], −∞ for ids that may not be drawn; likeliest int64 [R], negative where a
    row has none, which stays; wishes float64 [R, 5].
    """
    if way is SamplingMode.LIKELIEST:
        return likeliest
    parts = zip(logits.split(_ROWS_AT_ONCE), wishes.split(_ROWS_AT_ONCE), strict=True)
    drawn = torch.cat([_draw(*part, way) for part in parts])
    has_chance = (likeliest >= 0) & (drawn >= 0) & (wishes[:, 1] != 0)
    return torch.where(has_chance, drawn, likeliest)


def _draw(logits: Tensor, wishes: Tensor, way: SamplingMode) -> Tensor:
    uniform, temperature, min_p, top_k, top_p = wishes.unsqueeze(-1).unbind(1)
    weights = _weights(logits, temperature, min_p)
    if way is SamplingMode.FROM_FIRST:
        weights = _first(weights, logits, top_k, top_p)
    return _pick(weights, uniform)


def _weights(logits: Tensor, temperature: Tensor, min_p: Tensor) -> Tensor:
    """Likelihoods after temperature, as parts of the best's: [R, N]; 0 for those below min_p."""
    heat = temperature.clamp(_COLDEST, _HOTTEST).to(logits.dtype)
    weights = ((logits - logits.amax(dim=-1, keepdim=True)) / heat).exp()
    return weights.masked_fill(weights < min_p.to(weights.dtype), 0)


def _first(weights: Tensor, logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """0 for all but so many ids, and then the fewest whose likelihood reaches top_p.

    Logits say who is first: heat makes weights equal.
    """
    ids = logits.sort(dim=-1, descending=True, stable=True).indices
    ordered = weights.gather(-1, ids)
    rank = torch.arange(weights.shape[-1], device=weights.device)
    ordered = ordered.masked_fill((top_k > 0) & (rank >= top_k), 0)
    sums = ordered.cumsum(dim=-1, dtype=torch.float64)
    reached = (sums - ordered >= top_p * sums[:, -1:]) & (top_p < 1)
    ordered = ordered.masked_fill(reached & (rank > 0), 0)  # a tiny top_p rounds to 0
    return torch.zeros_like(weights).scatter(-1, ids, ordered)


def _pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """Invert each row's distribution function, ids in their own order, at its number: int64 [R].

    −1 where rounding leads to an id that has no likelihood: sums that a device takes in parallel
    can fall by a bit from one id to the next.
    """
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    total = sums[:, -1:]
    below = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))  # rounding
    ids = torch.searchsorted(sums, below, right=True).clamp(max=weights.shape[-1] - 1)
    return ids.masked_fill(weights.gather(-1, ids) <= 0, -1).squeeze(-1)

"""Logits to ids by chance: temperature, min_p, top_k, top_p, and one random number a row.

Owns the arithmetic, in tensors alone: it waits for no device, so that a graph may hold it. What a
row gets depends on its own logits and wishes, never on the rows beside it or on what those want.

Letters: R rows, N vocabulary.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

_HOTTEST = torch.finfo(torch.float32).max
"""Temperatures above this are taken as this: in float32 they are infinite, and −∞ / ∞ is NaN."""

_ROWS_AT_ONCE = 64
"""Sorting takes some thirty bytes for each id of each row."""


class Way(IntEnum):
    """How an id is drawn, cheapest first. A dearer way gives a row the same id as its own."""

    LIKELIEST = 0
    FROM_ALL = 1
    """By likelihood, after temperature and min_p."""
    FROM_FIRST = 2
    """The same, after top_k and top_p, which want ids in the order of their likelihood."""


class Wish(NamedTuple):
    """What one row wants. `uniform` in [0, 1) decides; temperature 0 asks for the likeliest id."""

    uniform: float
    temperature: float
    min_p: float
    top_k: int
    top_p: float

    @property
    def way(self) -> Way:
        """The cheapest that does it."""
        if self.temperature == 0:
            return Way.LIKELIEST
        return Way.FROM_FIRST if self.top_k > 0 or self.top_p < 1 else Way.FROM_ALL


NO_WISH = Wish(0.0, 0.0, 0.0, 0, 1.0)


def as_tensor(wishes: Sequence[Wish]) -> Tensor:
    """Float64 [R, 5], on the CPU; every value of a wish is exact in it."""
    return torch.tensor(wishes, dtype=torch.float64).view(-1, len(NO_WISH))


def draw_ids(logits: Tensor, likeliest: Tensor, wishes: Tensor, way: Way) -> Tensor:
    """An id for each row, int64 [R], by a way that is at least as dear as any row's own.

    logits float32 [R, N], −∞ for ids that may not be drawn; likeliest int64 [R], negative where a
    row has none, which stays; wishes float64 [R, 5].
    """
    if way is Way.LIKELIEST:
        return likeliest
    parts = zip(logits.split(_ROWS_AT_ONCE), wishes.split(_ROWS_AT_ONCE), strict=True)
    drawn = torch.cat([_draw(*part, way) for part in parts])
    has_chance = (likeliest >= 0) & (drawn >= 0) & (wishes[:, 1] != 0)
    return torch.where(has_chance, drawn, likeliest)


def _draw(logits: Tensor, wishes: Tensor, way: Way) -> Tensor:
    uniform, temperature, min_p, top_k, top_p = wishes.unsqueeze(-1).unbind(1)
    probs = _likelihoods(logits, temperature, min_p)
    if way is Way.FROM_FIRST:
        probs = _first(probs, top_k, top_p)
    return _pick(probs, uniform)


def _likelihoods(logits: Tensor, temperature: Tensor, min_p: Tensor) -> Tensor:
    """Likelihoods [R, N] after temperature, and 0 for ids less likely than min_p of the best."""
    heat = temperature.clamp(max=_HOTTEST).masked_fill(temperature == 0, 1)
    probs = torch.softmax(logits / heat.to(logits.dtype), dim=-1)
    least = min_p.to(probs.dtype) * probs.amax(dim=-1, keepdim=True)
    return probs.masked_fill(probs < least, 0)


def _first(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """0 for all but so many ids, and then the fewest whose likelihood reaches top_p."""
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(probs.shape[-1], device=probs.device)
    ordered = ordered.masked_fill((top_k > 0) & (rank >= top_k), 0)
    sums = ordered.cumsum(dim=-1, dtype=torch.float64)
    reached = (sums - ordered >= top_p * sums[:, -1:]) & (top_p < 1)
    ordered = ordered.masked_fill(reached & (rank > 0), 0)  # a tiny top_p rounds to 0
    return torch.zeros_like(probs).scatter(-1, ids, ordered)


def _pick(probs: Tensor, uniform: Tensor) -> Tensor:
    """Invert each row's distribution function, ids in their own order, at its number: int64 [R].

    −1 where rounding leads to an id that has no likelihood: sums that a device takes in parallel
    can fall by a bit from one id to the next.
    """
    sums = probs.cumsum(dim=-1, dtype=torch.float64)
    total = sums[:, -1:]
    below = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))  # rounding
    ids = torch.searchsorted(sums, below, right=True).clamp(max=probs.shape[-1] - 1)
    return ids.masked_fill(probs.gather(-1, ids) <= 0, -1).squeeze(-1)

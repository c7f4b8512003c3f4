"""Logits to ids, for a batch of rows that each want something else.

Owns the filters (temperature, min_p, top_k, top_p) and the randomness. What a row gets depends on
its own logits, parameters and (seed, choice index, absolute token index) alone, never on the rows
beside it: there is no generator whose order of use could matter.

Letters: R rows, N vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from engine import ops
from engine.adjust import adjust
from engine.outputs import TokenLogprob
from engine.params import SamplingParams
from engine.scoring import score

_MASK = 2**64 - 1

_HOTTEST = torch.finfo(torch.float32).max
"""Temperatures above this are taken as this: in float32 they are infinite, and −∞ / ∞ is NaN."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row wants: its parameters, and the random number in [0, 1) that decides.

    counts: how often ids of its prompt and text were generated. barred: ids not to be drawn now.
    """

    params: SamplingParams
    uniform: float
    counts: Mapping[int, int] = field(default_factory=dict)
    barred: Sequence[int] = ()

    @property
    def is_adjusted(self) -> bool:
        """Whether anything but the filters changes its logits."""
        params = self.params
        return bool(
            self.counts or self.barred or params.logit_bias or params.allowed_token_ids is not None
        )

    @property
    def wants_more(self) -> bool:
        """Whether it wants anything but the likeliest id as the model has it."""
        params = self.params
        return not params.is_greedy or self.is_adjusted or params.logprobs is not None


class Drawn(NamedTuple):
    """An id, and how likely the model held it where that was asked for."""

    token_id: int
    logprob: TokenLogprob | None


def uniform(seed: int, choice: int, token_index: int) -> float:
    """A number in [0, 1) that is a function of its arguments only (three rounds of SplitMix64).

    seed: any int64. choice: index of the choice in its request. token_index: place of the token
    to be drawn, counted from the start of the sequence, prompt included.
    """
    mixed = 0
    for word in (seed, choice, token_index):
        mixed = _mix((mixed + word + 0x9E3779B97F4A7C15) & _MASK)
    return (mixed >> 11) / 2**53


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


class Sampler:
    """Draws ids among those that the tokenizer has."""

    def __init__(self, sampleable_ids: Sequence[int], vocab_size: int, device: str) -> None:
        never = torch.ones(vocab_size, dtype=torch.bool)
        never[torch.tensor(sampleable_ids)] = False
        self._never = never.nonzero().flatten().to(device)

    def sample(self, logits: Tensor, draws: Sequence[Draw]) -> list[Drawn | None]:
        """One id for each row of logits float32 [R, N]; those of forbidden ids are overwritten.

        None where a row's logits are not finite, or all its ids are forbidden.
        """
        allowed = self._allowed(logits, draws)
        likeliest: list[int] = ops.likeliest(allowed).tolist()
        ids = self._draw(allowed, likeliest, draws)
        logprobs = _logprobs(logits, ids, draws)
        return [
            None if best == ops.NO_PLACE else Drawn(token_id, logprobs.get(row))
            for row, (token_id, best) in enumerate(zip(ids, likeliest, strict=True))
        ]

    def likeliest(self, logits: Tensor) -> Tensor:
        """The likeliest id of each row of logits, −1 if none is finite; waits for no device."""
        return ops.likeliest(logits.index_fill(-1, self._never, -torch.inf))

    def choose(
        self, logits: Tensor, likeliest: Tensor, draws: Sequence[Draw]
    ) -> list[Drawn | None]:
        """As `sample`, where `likeliest` int64 [R] is known and is all that most rows want."""
        if any(draw.wants_more for draw in draws):
            return self.sample(logits, draws)
        return [None if i == ops.NO_PLACE else Drawn(i, None) for i in likeliest.tolist()]

    def _allowed(self, logits: Tensor, draws: Sequence[Draw]) -> Tensor:
        """Logits as adjusted, −∞ for forbidden ids: in place where nobody asks what they were."""
        if any(draw.is_adjusted or draw.params.logprobs is not None for draw in draws):
            logits = logits.clone()
        logits.index_fill_(-1, self._never, -torch.inf)
        for row, draw in enumerate(draws):
            if draw.is_adjusted:
                adjust(logits[row], draw.params, draw.counts, draw.barred)
        return logits

    def _draw(self, logits: Tensor, likeliest: list[int], draws: Sequence[Draw]) -> list[int]:
        """The likeliest ids, replaced where a row has one and wants chance."""
        ids = list(likeliest)
        able = [row for row, token_id in enumerate(likeliest) if token_id != ops.NO_PLACE]
        for wanted, draw in ((_needs_order, _draw_ordered), (_needs_no_order, _draw_unordered)):
            rows = [row for row in able if wanted(draws[row].params)]
            if rows:
                chosen = draw(logits[rows], [draws[row] for row in rows])
                for row, token_id in zip(rows, chosen.tolist(), strict=True):
                    ids[row] = token_id
        return ids


def _logprobs(logits: Tensor, ids: Sequence[int], draws: Sequence[Draw]) -> dict[int, TokenLogprob]:
    """By row, for those that ask; the longest list that anybody wants is cut for the others."""
    able = (row for row, token_id in enumerate(ids) if token_id != ops.NO_PLACE)
    wanted = {row: n for row in able if (n := draws[row].params.logprobs) is not None}
    if not wanted:
        return {}
    rows = list(wanted)
    scores = score(logits[rows], [ids[row] for row in rows], max(wanted.values()))
    return {
        row: TokenLogprob(one.token_id, one.logprob, one.top[: wanted[row]])
        for row, one in zip(rows, scores, strict=True)
    }


def _needs_order(params: SamplingParams) -> bool:
    """Whether ids must be sorted by likelihood to be filtered."""
    return not params.is_greedy and (params.top_k > 0 or params.top_p < 1)


def _needs_no_order(params: SamplingParams) -> bool:
    return not params.is_greedy and params.top_k <= 0 and params.top_p == 1


def _draw_unordered(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Ids int64 [R] for rows that only min_p filters."""
    return _pick(_likely(logits, draws), draws)


def _draw_ordered(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Ids int64 [R]: top_k keeps so many, then top_p the fewest whose likelihood reaches it."""
    probs, ids = _likely(logits, draws).sort(dim=-1, descending=True, stable=True)
    top_k = _column(probs, [d.params.top_k if d.params.top_k > 0 else len(ids[0]) for d in draws])
    rank = torch.arange(probs.shape[-1], device=probs.device)
    probs = probs.masked_fill(rank >= top_k, 0)
    sums = probs.cumsum(dim=-1, dtype=torch.float64)
    top_p = _column(sums, [draw.params.top_p for draw in draws])
    beyond = (sums - probs >= top_p * sums[:, -1:]) & (rank > 0)  # a tiny top_p rounds to 0
    probs = probs.masked_fill(beyond, 0)
    return ids.gather(-1, _pick(probs, draws).unsqueeze(-1)).squeeze(-1)


def _likely(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Likelihoods [R, N] after temperature, and 0 for ids less likely than min_p of the best."""
    temperature = _column(logits, [min(draw.params.temperature, _HOTTEST) for draw in draws])
    probs = torch.softmax(logits / temperature, dim=-1)
    if any(draw.params.min_p for draw in draws):
        min_p = _column(probs, [draw.params.min_p for draw in draws])
        probs = probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0)
    return probs


def _pick(probs: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Invert each row's distribution function at its random number: int64 [R]."""
    sums = probs.cumsum(dim=-1, dtype=torch.float64)
    total = sums[:, -1:]
    targets = _column(sums, [draw.uniform for draw in draws]) * total
    below = torch.minimum(targets, total.nextafter(torch.zeros_like(total)))  # rounding, at worst
    return torch.searchsorted(sums, below, right=True).squeeze(-1)


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    """One value a row, [R, 1], in the type and place of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(-1)

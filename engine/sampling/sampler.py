"""Logits to ids, for a batch of rows that each want something else.

Owns the order (what a request does to its logits, the draw, log-probabilities) and the randomness.
What a row gets depends on its own logits, parameters and (seed, choice index, absolute token index)
alone, never on the rows beside it: there is no generator whose order of use could matter.

Letters: R rows, N vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.outputs import SampledToken, TokenLogprob
from cottention.engine.sampling.logits_processors import Adjustment, adjust
from cottention.engine.sampling.logprobs import score
from cottention.engine.sampling.token_history import TokenCounts
from cottention.engine.sampling.topk_topp import SamplingRow, draw_each
from cottention.engine.sampling_params import SamplingParams

_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row wants: its parameters, and the random number in [0, 1) that decides.

    counts: how often ids of its prompt and text were generated. barred: ids not to be drawn now.
    """

    params: SamplingParams
    uniform: float
    counts: TokenCounts = field(default_factory=TokenCounts)
    barred: Sequence[int] = ()

    @property
    def adjustment(self) -> Adjustment:
        """What changes its logits but for the filters, if anything does."""
        return Adjustment(self.params, self.counts, self.barred)

    @property
    def wants_logits(self) -> bool:
        """Whether it wants anything but an id drawn from the logits as the model has them."""
        return bool(self.adjustment) or self.params.logprobs is not None

    @property
    def wish(self) -> SamplingRow:
        """What it wants of chance."""
        params = self.params
        temperature = 0.0 if params.is_greedy else params.temperature
        return SamplingRow(self.uniform, temperature, params.min_p, params.top_k, params.top_p)


def as_sampled_token(token_id: int, logprob: TokenLogprob | None = None) -> SampledToken | None:
    """None where no id could be drawn."""
    return None if token_id == ops.NO_INDEX else SampledToken(token_id, logprob)


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

    def sample(self, logits: Tensor, draws: Sequence[Draw]) -> list[SampledToken | None]:
        """One id for each row of logits float32 [R, N]; those of forbidden ids are overwritten.

        None where a row's logits are not finite, or all its ids are forbidden.
        """
        allowed = self._allowed(logits, draws)
        wishes = [draw.wish for draw in draws]
        ids: list[int] = draw_each(allowed, ops.argmax(allowed), wishes).tolist()
        logprobs = _logprobs(logits, ids, draws)
        return [as_sampled_token(token_id, logprobs.get(row)) for row, token_id in enumerate(ids)]

    def possible(self, logits: Tensor) -> Tensor:
        """A copy of logits [R, N] with −∞ for ids that the tokenizer does not have."""
        return logits.index_fill(-1, self._never, -torch.inf)

    def _allowed(self, logits: Tensor, draws: Sequence[Draw]) -> Tensor:
        """Logits as adjusted, −∞ for forbidden ids: in place where nobody asks what they were."""
        if any(draw.params.logprobs is not None for draw in draws):
            logits = logits.clone()
        logits.index_fill_(-1, self._never, -torch.inf)
        adjustments = {row: one for row, draw in enumerate(draws) if (one := draw.adjustment)}
        if adjustments:
            adjust(logits, adjustments)
        return logits


def _logprobs(logits: Tensor, ids: Sequence[int], draws: Sequence[Draw]) -> dict[int, TokenLogprob]:
    """By row, for those that ask; the longest list that anybody wants is cut for the others."""
    able = (row for row, token_id in enumerate(ids) if token_id != ops.NO_INDEX)
    wanted = {row: n for row in able if (n := draws[row].params.logprobs) is not None}
    if not wanted:
        return {}
    rows = list(wanted)
    scores = score(logits[rows], [ids[row] for row in rows], max(wanted.values()))
    return {
        row: replace(one, top=one.top[: wanted[row]]) for row, one in zip(rows, scores, strict=True)
    }

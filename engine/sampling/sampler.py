"""Logits to ids, for a batch of rows with different parameters.

A row's id depends on its own logits, parameters and (seed, choice index, absolute token index)
alone, never on other rows: random numbers are a function of these, not the state of a generator.

Letters: R rows, N vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.grammar.matcher import MaskRow
from cottention.engine.outputs import SampledToken, TokenLogprob
from cottention.engine.sampling.dry import RepeatPenalties
from cottention.engine.sampling.logits_processors import LogitsAdjustment, adjust_logits
from cottention.engine.sampling.logprobs import gather_logprobs, with_ids
from cottention.engine.sampling.token_constraints import NO_CONSTRAINTS, TokenConstraints
from cottention.engine.sampling.token_history import TokenCounts
from cottention.engine.sampling.topk_topp import SamplingRow, sample_each
from cottention.engine.sampling_params import SamplingParams

_MASK = 2**64 - 1
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class SamplingInput:
    """What the sampler needs for one row besides its logits.

    uniform: the row's random number in [0, 1). counts: how often each id of the prompt and the text
    was generated. masked_token_ids: ids that must not be sampled in this step, besides those of the
    constraints. is_early: whether stop ids must not be sampled yet. grammar_mask: ids that its
    grammar allows; None without a grammar. repeats: penalties of ids that would go on with a
    repetition.
    """

    params: SamplingParams
    uniform: float
    counts: TokenCounts = field(default_factory=TokenCounts)
    masked_token_ids: Sequence[int] = ()
    constraints: TokenConstraints = NO_CONSTRAINTS
    is_early: bool = False
    grammar_mask: MaskRow | None = None
    repeats: RepeatPenalties | None = None

    def adjustment(self, device: torch.device) -> LogitsAdjustment:
        """What changes its logits, which are on `device`, before temperature and filters."""
        constraints = self.constraints.on(device)
        return LogitsAdjustment(
            self.params,
            self.counts,
            self.masked_token_ids,
            constraints,
            self.is_early,
            self.grammar_mask,
            self.repeats,
        )

    @property
    def needs_logits(self) -> bool:
        """Whether more is to be done than to sample from unchanged logits."""
        return bool(self.adjustment(_CPU)) or self.params.logprobs is not None

    @property
    def sampling_row(self) -> SamplingRow:
        """Temperature, filters and the random number."""
        params = self.params
        temperature = 0.0 if params.is_greedy else params.temperature
        return SamplingRow(self.uniform, temperature, params.min_p, params.top_k, params.top_p)


def as_sampled_token(token_id: int, logprob: TokenLogprob | None = None) -> SampledToken | None:
    """None where no id could be sampled."""
    return None if token_id == ops.NO_INDEX else SampledToken(token_id, logprob)


def uniform(seed: int, choice: int, token_index: int) -> float:
    """A number in [0, 1) that is a function of its arguments only (three rounds of SplitMix64).

    seed: any int64. choice: index of the choice in its request. token_index: index of the token
    to be sampled, counted from the start of the sequence, prompt included.
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
    """Samples among the ids that the tokenizer has."""

    def __init__(self, sampleable_ids: Sequence[int], vocab_size: int, device: str) -> None:
        is_unsampleable = torch.ones(vocab_size, dtype=torch.bool)
        is_unsampleable[torch.tensor(sampleable_ids)] = False
        self._unsampleable_ids = is_unsampleable.nonzero().flatten().to(device)

    def sample(self, logits: Tensor, inputs: Sequence[SamplingInput]) -> list[SampledToken | None]:
        """One id for each row of logits float32 [R, N], which may be changed in place.

        None where a row's logits are not finite, or all its ids are masked.
        """
        adjusted = self._adjusted(logits, inputs)
        rows = [each.sampling_row for each in inputs]
        ids: list[int] = sample_each(adjusted, ops.argmax(adjusted), rows).tolist()
        logprobs = _logprobs(logits, ids, inputs)
        return [as_sampled_token(token_id, logprobs.get(row)) for row, token_id in enumerate(ids)]

    def likeliest(self, logits: Tensor) -> list[int]:
        """The id of the largest logit of each row of float32 [R, N], which is changed in place.

        NO_INDEX where a row's logits are not finite.
        """
        self._mask(logits)
        ids: list[int] = ops.argmax(logits).tolist()
        return ids

    def mask_unsampleable(self, logits: Tensor) -> Tensor:
        """A copy of logits [R, N] with −∞ for ids that the tokenizer does not have."""
        return logits.index_fill(-1, self._unsampleable_ids, -torch.inf)

    def _mask(self, logits: Tensor) -> None:
        """−∞, in place, for ids that the tokenizer does not have."""
        if len(self._unsampleable_ids):
            logits.index_fill_(-1, self._unsampleable_ids, -torch.inf)

    def _adjusted(self, logits: Tensor, inputs: Sequence[SamplingInput]) -> Tensor:
        """Adjusted logits, −∞ for masked ids: in place where no row needs the original ones."""
        if any(each.params.logprobs is not None for each in inputs):
            logits = logits.clone()
        self._mask(logits)
        adjusted = (each.adjustment(logits.device) for each in inputs)
        adjustments = {row: one for row, one in enumerate(adjusted) if one}
        if adjustments:
            adjust_logits(logits, adjustments)
        return logits


def _logprobs(
    logits: Tensor, ids: Sequence[int], inputs: Sequence[SamplingInput]
) -> dict[int, TokenLogprob]:
    """Log-probabilities by row, where a row asks for them.

    All rows are computed with the longest list of alternatives, and cut to their own length.
    """
    sampled = (row for row, token_id in enumerate(ids) if token_id != ops.NO_INDEX)
    num_top = {row: n for row in sampled if (n := inputs[row].params.logprobs) is not None}
    if not num_top:
        return {}
    rows = list(num_top)
    logprobs = gather_logprobs(logits[rows], [ids[row] for row in rows], max(num_top.values()))
    found = {
        row: replace(one, top=one.top[: num_top[row]])
        for row, one in zip(rows, logprobs, strict=True)
    }
    asked = {row: named for row in rows if (named := inputs[row].params.logprob_token_ids)}
    return found | {row: with_ids(found[row], logits[row], named) for row, named in asked.items()}

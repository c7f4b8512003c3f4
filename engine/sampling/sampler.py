"""Logits to ids, for a batch of rows with different parameters.

A row's id depends on its own logits, parameters and random number alone, never on other rows.

Letters: R rows, N vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.outputs import TokenLogprob
from cottention.engine.sampling.logits_processors import LogitsAdjustment, adjust_logits
from cottention.engine.sampling.logprobs import gather_logprobs, with_ids
from cottention.engine.sampling.topk_topp import sample_each


class Sampled(NamedTuple):
    """An id for each row, int64 [R], NO_INDEX where none could be sampled; log-probabilities by
    row, of the rows that ask for them.
    """

    ids: Tensor
    logprobs: dict[int, TokenLogprob]


class Sampler:
    """Samples among the ids that the tokenizer has."""

    def __init__(self, sampleable_ids: Sequence[int], vocab_size: int, device: str) -> None:
        self.vocab_size = vocab_size
        is_unsampleable = torch.ones(vocab_size, dtype=torch.bool)
        is_unsampleable[torch.tensor(sampleable_ids)] = False
        self._unsampleable_ids = is_unsampleable.nonzero().flatten().to(device)

    def sample(
        self, logits: Tensor, sampling_rows: Tensor, adjustments: Mapping[int, LogitsAdjustment]
    ) -> Sampled:
        """One id for each row of logits float32 [R, N], which may be changed in place.

        sampling_rows float64 [R, 5] on the CPU, as `topk_topp.py` has them; adjustments: of the
        rows that want more than that. No id for a row whose logits are not finite, or all of whose
        ids are masked.
        """
        adjusted = self._adjusted(logits, adjustments)
        ids = sample_each(adjusted, ops.argmax(adjusted), sampling_rows)
        return Sampled(ids, _logprobs(logits, ids, adjustments) if adjustments else {})

    def likeliest(self, logits: Tensor) -> Tensor:
        """The id of the largest logit of each row of float32 [R, N], which is changed: int64 [R].

        NO_INDEX where a row's logits are not finite.
        """
        self.mask(logits)
        return ops.argmax(logits)

    def mask(self, logits: Tensor) -> None:
        """−∞, in place, for ids that the tokenizer does not have."""
        if len(self._unsampleable_ids):
            logits.index_fill_(-1, self._unsampleable_ids, -torch.inf)

    def _adjusted(self, logits: Tensor, adjustments: Mapping[int, LogitsAdjustment]) -> Tensor:
        """Adjusted logits, −∞ for masked ids: in place where no row needs the original ones."""
        if any(each.params.logprobs is not None for each in adjustments.values()):
            logits = logits.clone()
        self.mask(logits)
        if adjustments:
            adjust_logits(logits, adjustments)
        return logits


def _logprobs(
    logits: Tensor, sampled: Tensor, adjustments: Mapping[int, LogitsAdjustment]
) -> dict[int, TokenLogprob]:
    """Log-probabilities by row, where a row asks for them.

    All rows are computed with the longest list of alternatives, and cut to their own length.
    """
    ids: list[int] = sampled.tolist()
    asking = {
        row: each.params
        for row, each in adjustments.items()
        if each.params.logprobs is not None and ids[row] != ops.NO_INDEX
    }
    if not asking:
        return {}
    rows = list(asking)
    num_top = {row: params.logprobs or 0 for row, params in asking.items()}
    logprobs = gather_logprobs(logits[rows], [ids[row] for row in rows], max(num_top.values()))
    found = {
        row: replace(one, top=one.top[: num_top[row]])
        for row, one in zip(rows, logprobs, strict=True)
    }
    named = {row: params.logprob_token_ids for row, params in asking.items()}
    return found | {row: with_ids(found[row], logits[row], n) for row, n in named.items() if n}

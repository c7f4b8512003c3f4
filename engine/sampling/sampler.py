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
from cottention.engine.sampling_params import SamplingParams


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
        asking = [row for row, each in adjustments.items() if each.params.logprobs is not None]
        unchanged = logits[asking] if asking else logits
        ids = sample_each(logits, self._adjusted(logits, adjustments), sampling_rows)
        params = {row: adjustments[row].params for row in asking}
        return Sampled(ids, _logprobs(unchanged, ids, params) if asking else {})

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
        """Adjust the logits in place, −∞ for masked ids; returns the likeliest ids, int64 [R]."""
        self.mask(logits)
        if adjustments:
            adjust_logits(logits, adjustments)
        return ops.argmax(logits)


def _logprobs(
    logits: Tensor, ids: Tensor, params: Mapping[int, SamplingParams]
) -> dict[int, TokenLogprob]:
    """Log-probabilities of the rows that ask for them, from their own logits, in this order.

    All are computed with the longest list of alternatives, and cut to their own length.
    """
    chosen: list[int] = ids[[*params]].tolist()
    num_top = {row: each.logprobs or 0 for row, each in params.items()}
    entries = gather_logprobs(logits, [max(i, 0) for i in chosen], max(num_top.values()))
    found: dict[int, TokenLogprob] = {}
    for place, (row, token_id) in enumerate(zip(params, chosen, strict=True)):
        if token_id != ops.NO_INDEX:
            named, entry = params[row].logprob_token_ids, entries[place]
            cut = replace(entry, top=entry.top[: num_top[row]])
            found[row] = with_ids(cut, logits[place], named) if named else cut
    return found

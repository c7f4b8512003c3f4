"""Log-probabilities to report: the model's own, before masks, bias, penalties and temperature."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cottention.engine.outputs import TokenLogprob


def with_ids(entry: TokenLogprob, logits: Tensor, token_ids: Sequence[int]) -> TokenLogprob:
    """A row's entry with these ids in place of the most likely ones; logits float32 [N]."""
    logprobs = torch.log_softmax(logits, dim=-1)[list(token_ids)].tolist()
    return replace(entry, top=tuple(zip(token_ids, logprobs, strict=True)))


def gather_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Log-probability and rank of one id for each row, and the `num_top` most likely ids.

    logits float32 [R, N]; token_ids has R ids.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(-1, torch.tensor(token_ids, device=logits.device).unsqueeze(-1))
    ranks = (logprobs > chosen).sum(-1) + 1
    top = logprobs.topk(min(num_top, logits.shape[-1]), dim=-1)
    return [
        TokenLogprob(token_id, logprob, rank, tuple(zip(ids, values, strict=True)))
        for token_id, logprob, rank, ids, values in zip(
            token_ids,
            chosen.squeeze(-1).tolist(),
            ranks.tolist(),
            top.indices.tolist(),
            top.values.tolist(),
            strict=True,
        )
    ]

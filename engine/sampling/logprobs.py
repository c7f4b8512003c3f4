"""Log-probabilities to report: the model's own, before masks, bias, penalties and temperature."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cottention.engine.outputs import TokenLogprob


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

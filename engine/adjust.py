"""What a request's parameters do to its own logits before an id is drawn. Knows no other row.

The order is vLLM's: what may not be drawn, then bias, then penalties for what came before.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.params import SamplingParams


def adjust(
    logits: Tensor, params: SamplingParams, counts: Mapping[int, int], barred: Sequence[int]
) -> None:
    """Change one row of logits float32 [N] in place.

    counts: how often each id of prompt and text was generated. barred: ids not to be drawn now.
    """
    if params.allowed_token_ids is not None:
        allowed = _ids(logits, params.allowed_token_ids)
        kept = logits[allowed]
        logits.fill_(-torch.inf)
        logits[allowed] = kept
    if barred:
        logits[_ids(logits, barred)] = -torch.inf
    if params.logit_bias:
        logits[_ids(logits, params.logit_bias)] += logits.new_tensor([*params.logit_bias.values()])
    if counts:
        _penalise(logits, params, counts)


def _penalise(logits: Tensor, params: SamplingParams, counts: Mapping[int, int]) -> None:
    ids = _ids(logits, counts)
    times = logits.new_tensor([*counts.values()])
    seen = logits[ids]
    repetition = params.repetition_penalty
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    seen -= params.frequency_penalty * times + params.presence_penalty * (times > 0)
    logits[ids] = seen


def _ids(like: Tensor, ids: Sequence[int] | Mapping[int, object]) -> Tensor:
    return torch.tensor([*ids], device=like.device)

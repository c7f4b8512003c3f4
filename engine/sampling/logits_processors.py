"""Masks, bias and penalties of requests, applied to their own rows of the logits.

The order is vLLM's: masks, then bias, then penalties. Rows are processed together, because a call
costs more than its work.

Letters: R rows, N vocabulary, M ids of several rows, concatenated.
"""

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cottention.engine.sampling.token_history import TokenCounts
from cottention.engine.sampling_params import SamplingParams

_MIN_PENALTY = 1e-30
"""Repetition penalties are clamped to this and to 1 / this: logits stay finite."""


@dataclass(frozen=True, slots=True)
class LogitsAdjustment:
    """What changes the logits of one row; false if nothing does.

    counts: how often each id of its prompt and text was generated, empty without a penalty.
    masked_token_ids: ids that must not be sampled in this step.
    """

    params: SamplingParams
    counts: TokenCounts
    masked_token_ids: Sequence[int]

    def __bool__(self) -> bool:
        params = self.params
        has_allowed = params.allowed_token_ids is not None
        return bool(has_allowed or self.masked_token_ids or params.logit_bias or self.counts)


def adjust_logits(logits: Tensor, adjustments: Mapping[int, LogitsAdjustment]) -> None:
    """Change the rows of logits float32 [R, N], contiguous, that have an adjustment, in place."""
    _apply_allowed_token_ids(logits, adjustments)
    _apply_masked_token_ids(logits, adjustments)
    _apply_logit_bias(logits, adjustments)
    _apply_penalties(logits, adjustments)


def _apply_allowed_token_ids(logits: Tensor, adjustments: Mapping[int, LogitsAdjustment]) -> None:
    allowed = {
        row: one.params.allowed_token_ids
        for row, one in adjustments.items()
        if one.params.allowed_token_ids is not None
    }
    if allowed:
        places = _places(logits, {row: array("q", ids) for row, ids in allowed.items()})
        kept = logits.take(places)
        logits[[*allowed]] = -torch.inf
        logits.put_(places, kept)


def _apply_masked_token_ids(logits: Tensor, adjustments: Mapping[int, LogitsAdjustment]) -> None:
    masked = {
        row: array("q", one.masked_token_ids)
        for row, one in adjustments.items()
        if one.masked_token_ids
    }
    if masked:
        logits.view(-1).index_fill_(0, _places(logits, masked), -torch.inf)


def _apply_logit_bias(logits: Tensor, adjustments: Mapping[int, LogitsAdjustment]) -> None:
    biases = {row: one.params.logit_bias for row, one in adjustments.items()}
    biases = {row: bias for row, bias in biases.items() if bias}
    if biases:
        places = _places(logits, {row: array("q", bias) for row, bias in biases.items()})
        values = [array("f", bias.values()) for bias in biases.values()]
        logits.view(-1).index_add_(0, places, _concatenated(values, torch.float32, logits.device))


def _apply_penalties(logits: Tensor, adjustments: Mapping[int, LogitsAdjustment]) -> None:
    rows = {row: one for row, one in adjustments.items() if one.counts}
    if not rows:
        return
    places = _places(logits, {row: one.counts.ids for row, one in rows.items()})
    times = _concatenated((one.counts.times for one in rows.values()), torch.float32, logits.device)
    lengths = [len(one.counts) for one in rows.values()]

    def penalty(value_of: Callable[[SamplingParams], float]) -> Tensor | float:
        """[M], or one number where all rows have the same value."""
        values = [value_of(one.params) for one in rows.values()]
        is_same = len(set(values)) == 1
        return values[0] if is_same else _repeated(values, lengths).to(logits.device)

    seen = logits.take(places)
    repetition = penalty(
        lambda params: min(max(params.repetition_penalty, _MIN_PENALTY), 1 / _MIN_PENALTY)
    )
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    frequency = penalty(lambda params: params.frequency_penalty)
    presence = penalty(lambda params: params.presence_penalty)
    logits.put_(places, seen - (frequency * times + presence * (times > 0)))


def _places(logits: Tensor, ids: Mapping[int, "array[int]"]) -> Tensor:
    """Indices of these rows' ids in the flattened logits: int64 [M]."""
    places = _concatenated(ids.values(), torch.int64, torch.device("cpu"))
    starts = _repeated([row * logits.shape[-1] for row in ids], [*map(len, ids.values())])
    return places.add_(starts).to(logits.device)


def _repeated(values: Sequence[float], times: Sequence[int]) -> Tensor:
    """Each value repeated as often as `times` says, on the CPU: [M]."""
    return torch.tensor(values).repeat_interleave(torch.tensor(times))


def _concatenated(
    columns: "Iterable[array[int] | array[float]]", dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The concatenated values of arrays, copied: [M]."""
    return torch.cat([torch.frombuffer(column, dtype=dtype) for column in columns]).to(device)

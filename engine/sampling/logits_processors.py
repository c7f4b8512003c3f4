"""Masks, bias and penalties of requests, applied to their own rows of the logits.

The order is vLLM's: masks, those of grammars among them, then bias, then penalties, of which DRY is
the last. Rows are processed together, because a call costs more than its work.

Letters: R rows, N vocabulary, M ids of several rows, concatenated.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.grammar.matcher import MaskRow
from cottention.engine.sampling.dry import RepeatPenalties
from cottention.engine.sampling.token_constraints import NO_CONSTRAINTS, TokenConstraints
from cottention.engine.sampling.token_history import TokenCounts
from cottention.engine.sampling_params import SamplingParams

_MIN_PENALTY = 1e-30
"""Repetition penalties are clamped to this and to 1 / this: logits stay finite."""


@dataclass(frozen=True, slots=True)
class LogitsAdjustment:
    """What changes the logits of one row, or is told of them; false if nothing is.

    counts: how often each id of its prompt and text was generated, empty without a penalty.
    masked_token_ids: ids that must not be sampled in this step, besides those of the constraints.
    is_early: whether stop ids must not be sampled yet.
    grammar_mask: ids that the row's grammar allows; None without a grammar.
    repeats: what is subtracted from the logits of ids that would go on with a repetition.
    """

    params: SamplingParams
    counts: TokenCounts
    masked_token_ids: Sequence[int] = ()
    constraints: TokenConstraints = NO_CONSTRAINTS
    is_early: bool = False
    grammar_mask: MaskRow | None = None
    repeats: RepeatPenalties | None = None

    @property
    def mask(self) -> Tensor | None:
        """Ids that must not be sampled: bool, as many as the tokenizer has; None if there are none.

        One tensor for all rows of a request.
        """
        return self.constraints.early_mask if self.is_early else self.constraints.mask

    def __bool__(self) -> bool:
        tensors = (self.mask, self.constraints.biases, self.grammar_mask)
        is_told = self.params.logprobs is not None
        has_ids = any(each is not None for each in tensors)
        return is_told or has_ids or bool(self.masked_token_ids or self.counts or self.repeats)


def adjust_logits(logits: Tensor, adjustments: Mapping[int, LogitsAdjustment]) -> None:
    """Change the rows of logits float32 [R, N], contiguous, that have an adjustment, in place."""
    _apply_masks(logits, adjustments)
    _apply_grammar_masks(logits, adjustments)
    _apply_masked_token_ids(logits, adjustments)
    _apply_logit_bias(logits, adjustments)
    _apply_penalties(logits, adjustments)
    _apply_repeat_penalties(logits, adjustments)


def _apply_masks(logits: Tensor, adjustments: Mapping[int, LogitsAdjustment]) -> None:
    """One call for consecutive rows of a request, which have the same mask."""
    runs: list[tuple[int, int, Tensor]] = []
    for row in sorted(adjustments):
        mask = adjustments[row].mask
        if mask is None:
            continue
        start, stop, before = runs[-1] if runs else (row, row, mask)
        if runs and stop == row and before is mask:
            runs[-1] = (start, row + 1, mask)
        else:
            runs.append((row, row + 1, mask))
    for start, stop, mask in runs:
        logits[start:stop, : len(mask)].masked_fill_(mask, -torch.inf)


def _apply_grammar_masks(logits: Tensor, adjustments: Mapping[int, LogitsAdjustment]) -> None:
    """One call for all rows whose masks were computed together, as those of a step are."""
    groups: dict[int, tuple[Tensor, list[int], list[int]]] = {}
    for row, one in adjustments.items():
        if one.grammar_mask is not None:
            masks, place = one.grammar_mask
            _, rows, places = groups.setdefault(id(masks), (masks, [], []))
            rows.append(row)
            places.append(place)
    for masks, rows, places in groups.values():
        ops.apply_token_bitmask(logits, rows, masks, places)


def _apply_masked_token_ids(logits: Tensor, adjustments: Mapping[int, LogitsAdjustment]) -> None:
    masked = {
        row: torch.tensor(one.masked_token_ids, device=logits.device)
        for row, one in adjustments.items()
        if one.masked_token_ids
    }
    if masked:
        logits.view(-1).index_fill_(0, _places(logits, masked), -torch.inf)


def _apply_logit_bias(logits: Tensor, adjustments: Mapping[int, LogitsAdjustment]) -> None:
    ids: dict[int, Tensor] = {}
    biases: list[Tensor] = []
    for row, one in adjustments.items():
        constraints = one.constraints
        if constraints.biased_ids is not None and constraints.biases is not None:
            ids[row] = constraints.biased_ids
            biases.append(constraints.biases)
    if ids:
        logits.view(-1).index_add_(0, _places(logits, ids), torch.cat(biases))


def _apply_penalties(logits: Tensor, adjustments: Mapping[int, LogitsAdjustment]) -> None:
    rows = {row: one for row, one in adjustments.items() if one.counts}
    if not rows:
        return
    device = logits.device
    ids = {row: _as_tensor(one.counts.ids, torch.int64, device) for row, one in rows.items()}
    places = _places(logits, ids)
    times = torch.cat([_as_tensor(o.counts.times, torch.float32, device) for o in rows.values()])
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


def _apply_repeat_penalties(logits: Tensor, adjustments: Mapping[int, LogitsAdjustment]) -> None:
    rows = {row: one.repeats for row, one in adjustments.items() if one.repeats is not None}
    if not rows:
        return
    ids = {row: torch.from_numpy(each.ids).to(logits.device) for row, each in rows.items()}
    penalties = [torch.from_numpy(each.penalties) for each in rows.values()]
    places = _places(logits, ids)
    logits.view(-1).index_add_(0, places, torch.cat(penalties).to(logits.device), alpha=-1)


def _places(logits: Tensor, ids: Mapping[int, Tensor]) -> Tensor:
    """Indices of these rows' ids, int64 each, in the flattened logits: int64 [M]."""
    starts = _repeated([row * logits.shape[-1] for row in ids], [*map(len, ids.values())])
    return torch.cat([*ids.values()]).add_(starts.to(logits.device))


def _repeated(values: Sequence[float], times: Sequence[int]) -> Tensor:
    """Each value repeated as often as `times` says, on the CPU: [M]."""
    return torch.tensor(values).repeat_interleave(torch.tensor(times))


def _as_tensor(
    column: "array[int] | array[float]", dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The values of an array: [M]. On the CPU it is a view, with which the array cannot grow."""
    return torch.frombuffer(column, dtype=dtype).to(device)

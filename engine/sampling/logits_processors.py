"""What requests' parameters do to their own logits before ids are drawn. No row knows another.

The order is vLLM's: what may not be drawn, then bias, then penalties for what came before. Rows are
done together, since a call costs more than its work.

Letters: R rows, N vocabulary, M ids of some rows one after the other.
"""

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cottention.engine.sampling.token_history import TokenCounts
from cottention.engine.sampling_params import SamplingParams

_LEAST = 1e-30
"""Penalties below are taken as this, those above 1 / this as that: logits stay finite."""


@dataclass(frozen=True, slots=True)
class Adjustment:
    """What one row asks for.

    counts: how often ids of its prompt and text were generated. barred: ids not to be drawn now.
    """

    params: SamplingParams
    counts: TokenCounts
    barred: Sequence[int]

    def __bool__(self) -> bool:
        params = self.params
        is_limited = params.allowed_token_ids is not None
        return bool(is_limited or self.barred or params.logit_bias or self.counts)


def adjust(logits: Tensor, adjustments: Mapping[int, Adjustment]) -> None:
    """Change rows of logits float32 [R, N], contiguous, in place, each as its adjustment says."""
    _allow_alone(logits, adjustments)
    _bar(logits, adjustments)
    _bias(logits, adjustments)
    _penalise(logits, adjustments)


def _allow_alone(logits: Tensor, adjustments: Mapping[int, Adjustment]) -> None:
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


def _bar(logits: Tensor, adjustments: Mapping[int, Adjustment]) -> None:
    barred = {row: array("q", one.barred) for row, one in adjustments.items() if one.barred}
    if barred:
        logits.view(-1).index_fill_(0, _places(logits, barred), -torch.inf)


def _bias(logits: Tensor, adjustments: Mapping[int, Adjustment]) -> None:
    biases = {row: one.params.logit_bias for row, one in adjustments.items()}
    biases = {row: bias for row, bias in biases.items() if bias}
    if biases:
        places = _places(logits, {row: array("q", bias) for row, bias in biases.items()})
        values = [array("f", bias.values()) for bias in biases.values()]
        logits.view(-1).index_add_(0, places, _joined(values, torch.float32, logits.device))


def _penalise(logits: Tensor, adjustments: Mapping[int, Adjustment]) -> None:
    rows = {row: one for row, one in adjustments.items() if one.counts}
    if not rows:
        return
    places = _places(logits, {row: one.counts.ids for row, one in rows.items()})
    times = _joined((one.counts.times for one in rows.values()), torch.float32, logits.device)
    lengths = [len(one.counts) for one in rows.values()]

    def penalty(of: Callable[[SamplingParams], float]) -> Tensor | float:
        """[M], or one number where all rows have the same."""
        values = [of(one.params) for one in rows.values()]
        is_one = len(set(values)) == 1
        return values[0] if is_one else _repeated(values, lengths).to(logits.device)

    seen = logits.take(places)
    repetition = penalty(lambda params: min(max(params.repetition_penalty, _LEAST), 1 / _LEAST))
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    frequency = penalty(lambda params: params.frequency_penalty)
    presence = penalty(lambda params: params.presence_penalty)
    logits.put_(places, seen - (frequency * times + presence * (times > 0)))


def _places(logits: Tensor, ids: Mapping[int, "array[int]"]) -> Tensor:
    """Places in logits taken as one line of ids of these rows: int64 [M]."""
    places = _joined(ids.values(), torch.int64, torch.device("cpu"))
    starts = _repeated([row * logits.shape[-1] for row in ids], [*map(len, ids.values())])
    return places.add_(starts).to(logits.device)


def _repeated(values: Sequence[float], times: Sequence[int]) -> Tensor:
    """Each value so often, on the CPU: [M]."""
    return torch.tensor(values).repeat_interleave(torch.tensor(times))


def _joined(
    columns: "Iterable[array[int] | array[float]]", dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A copy of numbers that lie in arrays: [M]."""
    return torch.cat([torch.frombuffer(column, dtype=dtype) for column in columns]).to(device)

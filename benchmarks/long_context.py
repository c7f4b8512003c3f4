"""Bits per byte far beyond the trained length: exact, renewed, and softmax with a sliding window.

Three ways to score a long text in float32, independent of the engine: whole layers over windows or
chunks. The text is all held-out code in a row, repeated as needed; streams start at evenly spaced
positions.

Letters: B streams, T tokens, W window, R kept tokens.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.held_out import LongText
from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.gptj.model import Attend, CottentionForCausalLM
from cottention.engine.models.recurrence import Features
from cottention.engine.ops.varlen import chunked
from cottention.engine.training.forward import attend_from_zero

BORDERS = (0, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
KEPT_PART = 8
"""R = W / 8, the smallest value tried; the engine keeps W / 4, which scores the same."""

Nats = Callable[[CottentionForCausalLM, Tensor], Tensor]
"""A model and ids [T + 1] → −ln p of the last T ids, float32 [T]."""


@torch.inference_mode()
def exact(model: CottentionForCausalLM, ids: Tensor, *, piece: int = 4096) -> Tensor:
    """The recurrence from a zero state; the state is carried from piece to piece."""
    carried = _Carried(model.config)
    places = torch.arange(len(ids) - 1)
    parts = places.split(piece)
    return torch.cat([_nats(model, ids, part, part, carried) for part in parts])


@torch.inference_mode()
def renewed(model: CottentionForCausalLM, ids: Tensor, *, kept: int) -> Tensor:
    """At index W, then every W − kept tokens, the state is recomputed from the last `kept` ids.

    Computed as windows of W tokens from a zero state, of which the first scores all its tokens and
    each later one those behind the kept ids.
    """
    window, count = model.config.window, len(ids) - 1
    attend = attend_from_zero(model.config, torch.float32)
    parts = []
    for start in range(0, max(count - kept, 1), window - kept):
        places = torch.arange(start, min(start + window, count))
        nats = _nats(model, ids, places, places - start, attend)
        parts.append(nats[kept if start else 0 :])
    return torch.cat(parts)


@torch.inference_mode()
def sliding(model: CottentionForCausalLM, ids: Tensor) -> Tensor:
    """Softmax attention to the last W tokens, as with a KV cache of W entries."""
    places = torch.arange(len(ids) - 1)
    attend = functools.partial(_attend_sliding, model.config.window)
    return _nats(model, ids, places, places, attend)


@dataclass(frozen=True, slots=True)
class Bits:
    """Bits per byte of the tokens between two BORDERS.

    fresh: those of the same tokens in windows from a zero state, which tells how hard the text is
    at that place. level: per_byte scaled to text of average difficulty.
    """

    per_byte: float
    fresh: float
    level: float


def bits_by_position(
    model: CottentionForCausalLM,
    text: LongText,
    ways: Mapping[str, Nats],
    num_streams: int,
    length: int,
) -> Iterator[tuple[str, dict[str, Bits]]]:
    """Bits per byte between BORDERS up to `length` tokens, for each of the ways.

    Inside the window, where all ways agree, every token of the text is scored in adjacent windows;
    beyond it, `num_streams` streams from evenly spaced positions are scored.
    """
    window = model.config.window
    fresh = torch.zeros(len(text.ids))
    near = _Sums(text, window)
    for places, ids in text.streams(-(-len(text.ids) // window), window):
        fresh[places] = nats = next(iter(ways.values()))(model, ids)
        near.add(nats, nats, ids)
    for how, nats_of in ways.items():
        far = _Sums(text, length)
        for places, ids in text.streams(num_streams, length):
            far.add(nats_of(model, ids), fresh[places], ids)
        yield how, near.bits(0, window, None) | far.bits(window, length, near.total())


class _Sums:
    """Nats, nats in fresh windows, and bytes, by position: float64 [T]."""

    def __init__(self, text: LongText, length: int) -> None:
        self._token_bytes = text.token_bytes
        self._nats, self._fresh, self._bytes = torch.zeros(3, length, dtype=torch.float64)

    def add(self, nats: Tensor, fresh: Tensor, ids: Tensor) -> None:
        self._nats += nats
        self._fresh += fresh
        self._bytes += self._token_bytes[ids[1:]]

    def total(self) -> float:
        """Bits per byte in fresh windows, of everything added."""
        return float(self._fresh.sum() / self._bytes.sum()) / math.log(2)

    def bits(self, start: int, stop: int, hardness: float | None) -> dict[str, Bits]:
        """Between the borders from start to stop; hardness: bits per byte of average text."""
        borders = [border for border in BORDERS if start <= border <= stop]
        return {f"{a}-{b}": self._between(slice(a, b), hardness) for a, b in pairwise(borders)}

    def _between(self, places: slice, hardness: float | None) -> Bits:
        in_bits = math.log(2) * float(self._bytes[places].sum())
        bits, fresh = (float(each[places].sum()) / in_bits for each in (self._nats, self._fresh))
        return Bits(bits, fresh, bits if hardness is None else bits / fresh * hardness)


def _nats(
    model: CottentionForCausalLM, ids: Tensor, places: Tensor, positions: Tensor, attend: Attend
) -> Tensor:
    logits = model(ids[places].unsqueeze(0), positions, attend)[0]
    return nn.functional.cross_entropy(logits, ids[places + 1], reduction="none")


class _Carried:
    """An `Attend` whose state is carried from call to call."""

    def __init__(self, config: GPTJConfig) -> None:
        spec = config.state_spec()
        self._state = torch.zeros(1, *spec.shapes["state"])
        has_denominator = config.feature_map.has_denominator
        self._z = torch.zeros(1, *spec.shapes["denominator"]) if has_denominator else None

    def __call__(self, layer: int, features: Features) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in features[:3])
        z = None if self._z is None else self._z[:, layer]
        out, state, z = chunked(q, k, v, self._state[:, layer], z)
        self._state[:, layer] = state
        if self._z is not None:
            self._z[:, layer] = z
        return out.transpose(1, 2)


def _attend_sliding(window: int, _layer: int, features: Features) -> Tensor:
    """Blocks of W queries, each with its own keys and those of the block before."""
    length = features.q.shape[1]
    padding = -length % window
    q, k, v = (nn.functional.pad(x[0], (0, 0, 0, 0, 0, padding)) for x in features[:3])
    q, k, v = (x.unflatten(0, (-1, window)).transpose(1, 2) for x in (q, k, v))  # [n, H, W, D]
    k, v = (torch.cat([nn.functional.pad(x[:-1], (0,) * 6 + (1, 0)), x], dim=2) for x in (k, v))
    row, column = torch.arange(window).unsqueeze(-1), torch.arange(2 * window)
    seen = (column > row) & (column <= row + window)
    first = seen & (column >= window)
    mask = torch.stack([first, *[seen] * (len(q) - 1)]).unsqueeze(1)
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(0, 1)[:length].unsqueeze(0)

"""Kinds of attention: what each does to queries, keys and values before the recurrence.

A feature map takes q, k, v and the tokens' positions to what the recurrence is fed. Tables that
depend on positions alone (rotary angles, cosFormer's half wave) are computed once a step for all
layers. `attention_kinds.py` has the facts of each kind that need no torch.

Letters: N tokens, H heads, D head width, K key width, V value width, M cosFormer's fixed length.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.recurrence import Features

ROTARY_BASE = 10_000.0


@dataclass(frozen=True, slots=True)
class TokenPositions:
    """Positions of a batch's N tokens and what depends on them alone, computed once per step.

    index: int64 [N], each token's position in its own sequence, from 0.
    cos, sin: [N, rotary_dim / 2], the rotary angles of those positions; no columns without rotary.
    wave: [N, 2], cosFormer's sine and cosine of π·t/2M with t = index + 1; None for other kinds.
    """

    index: Tensor
    cos: Tensor
    sin: Tensor
    wave: Tensor | None = None


def token_positions(config: GPTJConfig, positions: Tensor, dtype: torch.dtype) -> TokenPositions:
    """Tables for int64 positions [N], from 0, in float32 or the wider `dtype`.

    Raises IndexError, on a CPU, for a position at or beyond cosFormer's M.
    """
    wide = torch.promote_types(dtype, torch.float32)
    cos, sin = ops.rotary_table(positions, config.rotary_dim, ROTARY_BASE, wide)
    if config.max_exact_length is None:
        return TokenPositions(positions, cos, sin)
    wave = half_wave(config.max_exact_length, wide, positions.device)
    return TokenPositions(positions, cos, sin, wave[positions])


@functools.cache
def half_wave(max_length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sine and cosine of π·t/2M for t from 1 to M: [M, 2].

    Computed one by one in Python's float64: the last bit of torch's sines may depend on the number
    of elements.
    """
    angles = [math.pi / 2 * t / max_length for t in range(1, max_length + 1)]
    pairs = [[math.sin(angle), math.cos(angle)] for angle in angles]
    with torch.inference_mode(False):  # the cached table is used in training, too
        return torch.tensor(pairs, dtype=torch.float64).to(device, dtype)


class Mix(Protocol):
    """A compiled op from a layer's first product to its second: `ops.cottention_attention_gelu`."""

    def __call__(
        self,
        joined: Tensor,
        positions: Tensor,
        sigma: Tensor,
        cos: Tensor,
        sin: Tensor,
        state: Tensor,
        state_indices: Tensor,
        cu_seqlens: Tensor | None,
        out: Tensor,
    ) -> None: ...


class AllLayers(Protocol):
    """A compiled op for all blocks of a packed model, as `ops.cottention_layers`."""

    def __call__(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        epsilon: float,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        state: Tensor,
        state_indices: Tensor,
        cu_seqlens: Tensor | None,
        normed: Tensor,
        joined: Tensor,
        attn_gelu: Tensor,
    ) -> None: ...


class FeatureMap(Protocol):
    """What one kind of attention feeds to the recurrence."""

    @property
    def layers(self) -> AllLayers | None:
        """An op for all blocks of a packed model, equal to the separate ops to the bit, or None."""
        ...

    @property
    def mix(self) -> Mix | None:
        """An op for map, recurrence and gelu, equal to the separate ops to the bit, or None."""
        ...

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, at: TokenPositions, sigma: Tensor, /
    ) -> Features:
        """Map q, k, v [..., N, H, D]; sigma float64 [H] is the layer's σ(m), zeros without m."""
        ...


@dataclass(frozen=True, slots=True)
class Cottention:
    """Cosine similarity (arXiv 2409.18747): q and k of unit length, v divided by position.

    After rotary, q′ = N(q), k′ = N(k), v′ = v / j^σ(m), with j the token's position from 1 and
    N(x) = x / max(‖x‖₂, 1e-12). There is no denominator and no 1/√d.
    """

    mix: Mix | None = ops.cottention_attention_gelu
    layers: AllLayers | None = ops.cottention_layers

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, at: TokenPositions, sigma: Tensor
    ) -> Features:
        return Features(*ops.cottention_features(q, k, v, at.index, sigma, at.cos, at.sin))


@dataclass(frozen=True, slots=True)
class CosFormer:
    """ReLU features, weighted by the cosine of the distance (arXiv 2202.08791), with denominator.

    φ_t(x) = [ReLU(x) sin(πt/2M); ReLU(x) cos(πt/2M)] on queries and keys, t counted from 1 and M
    fixed, so that φ_i(q)·φ_j(k) = ReLU(q)·ReLU(k) cos(π(i − j)/2M). No 1/√d. Rotary, where a model
    has it, is applied before the ReLU, in place of the position embeddings of the paper's models.
    """

    mix: Mix | None = None
    layers: AllLayers | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, at: TokenPositions, _sigma: Tensor
    ) -> Features:
        assert at.wave is not None
        sin, cos = at.wave.to(q.dtype).unsqueeze(-2).split(1, dim=-1)  # [N, 1, 1]
        q, k = (torch.relu(ops.rotate(x, at.cos, at.sin)) for x in (q, k))
        q, k = (torch.cat([x * sin, x * cos], dim=-1) for x in (q, k))
        return Features(q, k, v)


@dataclass(frozen=True, slots=True)
class Linear:
    """The linear transformer (arXiv 2006.16236): φ(x) = elu(x) + 1, with denominator.

    Rotary is applied before φ, so that scores stay positive.
    """

    mix: Mix | None = None
    layers: AllLayers | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, at: TokenPositions, _sigma: Tensor
    ) -> Features:
        q, k = (ops.elu_plus_one(ops.rotate(x, at.cos, at.sin)) for x in (q, k))
        return Features(q, k, v)


@dataclass(frozen=True, slots=True)
class Softmax:
    """Rotary alone, for softmax attention, which has no recurrent form."""

    mix: Mix | None = None
    layers: AllLayers | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, at: TokenPositions, _sigma: Tensor
    ) -> Features:
        return Features(ops.rotate(q, at.cos, at.sin), ops.rotate(k, at.cos, at.sin), v)


FEATURE_MAPS: dict[str, FeatureMap] = {
    "cottention": Cottention(),
    "cosformer": CosFormer(),
    "linear": Linear(),
}
"""The kinds of attention that are served, as a model folder's `attention_type` names them."""

TRAINED_MAPS: dict[str, FeatureMap] = {**FEATURE_MAPS, "softmax": Softmax()}
"""The kinds that are trained and measured: softmax is for comparison and cannot be served."""

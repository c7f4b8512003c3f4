"""What a model makes of where its tokens stand: rotary angles, and cosFormer's half wave.

Owns the tables that all layers of a step share. Knows no tensors of tokens and no state.

Letters: N tokens, M cosFormer's fixed length.

Feature maps: what each kind of attention does to queries, keys and values before the recurrence.

Owns the map (q, k, v, position) → (q′, k′, v′), the key width it leads to and whether the outputs
are divided by a denominator. Knows nothing of state, slots or batches: what comes out is fed to
`recurrent_step` and nothing else tells one kind of attention from another.

Where the recurrences of one batch live.

Owns the joining of a pool's rows with the slots and segments of a batch. Does not know whose they
are or what computes on them.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.models.config import ModelConfig

ROTARY_BASE = 10_000.0


@dataclass(frozen=True, slots=True)
class TokenPositions:
    """Where the N tokens of a batch stand, worked out once per step for all layers.

    index: int64 [N], counted from 0 from the start of each token's own sequence.
    cos, sin: [N, rotary_dim / 2], the rotary angles of those positions; no columns without rotary.
    wave: [N, 2], sine and cosine of π·t/2M with t counted from 1, where the attention has an M.
    """

    index: Tensor
    cos: Tensor
    sin: Tensor
    wave: Tensor | None = None


def token_positions(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> TokenPositions:
    """For int64 positions [N], counted from 0, in a model of `dtype`: tables float32 or wider.

    Raises IndexError on a CPU for a position that an attention with a fixed length does not have.
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

    A table, taken in Python's float64 one by one: torch's own sines may differ in the last bit
    with the number of positions that they are asked for.
    """
    angles = [math.pi / 2 * t / max_length for t in range(1, max_length + 1)]
    pairs = [[math.sin(angle), math.cos(angle)] for angle in angles]
    with torch.inference_mode(False):  # it outlives the step that asks first, and may be trained on
        return torch.tensor(pairs, dtype=torch.float64).to(device, dtype)


class Features(NamedTuple):
    """Mapped queries and keys [..., N, H, K] and values [..., N, H, V]."""

    q: Tensor
    k: Tensor
    v: Tensor


class Mix(Protocol):
    """All between a layer's two products in one compiled op, as `ops.cottention_attention_gelu`."""

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
    """All blocks of a packed model in one compiled op, as `ops.cottention_layers`."""

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
    """One kind of attention, as the recurrence sees it."""

    @property
    def layers(self) -> AllLayers | None:
        """The whole of a packed model's blocks as one op of equal bits, or None."""
        ...

    @property
    def mix(self) -> Mix | None:
        """Map, recurrence and gelu as one op of equal bits; None where nobody wrote one."""
        ...

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, at: TokenPositions, sigma: Tensor, /
    ) -> Features:
        """Map q, k, v [..., N, H, D]; sigma float64 [H] is σ(m) of the layer, 0 where none is."""
        ...


@dataclass(frozen=True, slots=True)
class Cottention:
    """Cosine similarity (arXiv 2409.18747): rotary, q and k to unit length, v over its position.

    q′ = N(q), k′ = N(k), v′ = v / j^σ(m) with j the token's position counted from 1 and
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
    """ReLU, reweighted by the cosine of the distance (arXiv 2202.08791), with denominator.

    φ_t(x) = [ReLU(x) sin(πt/2M); ReLU(x) cos(πt/2M)] on queries and keys, t counted from 1 and M
    fixed, so that φ_i(q)·φ_j(k) = ReLU(q)·ReLU(k) cos(π(i − j)/2M). No 1/√d. Rotary, where a model
    has it, comes before the ReLU: it stands for the embeddings of position that the paper's models
    add to their tokens.
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

    Rotary comes before φ, as it comes before Cottention's N: scores stay positive.
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
    """Queries and keys as softmax takes them: rotated. It has no recurrent form."""

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
"""Those that are trained and measured: softmax stands beside them and is never served."""


@dataclass(frozen=True, slots=True)
class Recurrence:
    """An `Attend` on rows of a pool.

    state [S, L, H, V, K] and z [S, L, H, K] or None: of all layers, changed in place.
    """

    state: Tensor
    z: Tensor | None
    segments: ops.Segments

    def layer(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Views [S, H, V, K] and [S, H, K] or None of one layer."""
        return self.state[:, index], None if self.z is None else self.z[:, index]

    def __call__(self, index: int, features: Features) -> Tensor:
        """Mapped q, k, v [N, H, ·] of layer `index` → outputs [N, H, V]; its rows move on."""
        return ops.recurrent_segments(*features, *self.layer(index), self.segments)

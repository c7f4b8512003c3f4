"""Feature maps: what each kind of attention does to queries, keys and values before the recurrence.

Owns the map (q, k, v, position) → (q′, k′, v′), the key width it leads to and whether the outputs
are divided by a denominator. Knows nothing of state, slots or batches: what comes out is fed to
`recurrent_step` and nothing else tells one kind of attention from another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from cottention.engine import ops
from cottention.engine.positions import TokenPositions
from torch import Tensor


class Features(NamedTuple):
    """Mapped queries and keys [..., N, H, K] and values [..., N, H, V]."""

    q: Tensor
    k: Tensor
    v: Tensor


class Mix(Protocol):
    """All between a layer's two products in one compiled op, as `ops.cottention_mix`."""

    def __call__(
        self,
        joined: Tensor,
        positions: Tensor,
        sigma: Tensor,
        cos: Tensor,
        sin: Tensor,
        state: Tensor,
        slots: Tensor,
        offsets: Tensor | None,
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
        slots: Tensor,
        offsets: Tensor | None,
        normed: Tensor,
        joined: Tensor,
        mixed: Tensor,
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

    @property
    def has_denominator(self) -> bool:
        """Whether outputs are divided by the sum of their scores."""
        ...

    @property
    def has_norm_const(self) -> bool:
        """Whether a model learns m, one scalar per head, and σ(m) means something."""
        ...

    def key_width(self, head_dim: int) -> int:
        """Width K of the mapped queries and keys for heads of `head_dim`."""
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

    has_denominator: bool = False
    has_norm_const: bool = True
    mix: Mix | None = ops.cottention_mix
    layers: AllLayers | None = ops.cottention_layers

    def key_width(self, head_dim: int) -> int:
        return head_dim

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

    has_denominator: bool = True
    has_norm_const: bool = False
    mix: Mix | None = None
    layers: AllLayers | None = None

    def key_width(self, head_dim: int) -> int:
        return 2 * head_dim

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

    has_denominator: bool = True
    has_norm_const: bool = False
    mix: Mix | None = None
    layers: AllLayers | None = None

    def key_width(self, head_dim: int) -> int:
        return head_dim

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, at: TokenPositions, _sigma: Tensor
    ) -> Features:
        q, k = (ops.elu_plus_one(ops.rotate(x, at.cos, at.sin)) for x in (q, k))
        return Features(q, k, v)


@dataclass(frozen=True, slots=True)
class Softmax:
    """Queries and keys as softmax takes them: rotated. It has no recurrent form."""

    has_denominator: bool = False
    has_norm_const: bool = False
    mix: Mix | None = None
    layers: AllLayers | None = None

    def key_width(self, head_dim: int) -> int:
        return head_dim

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

"""Feature maps: what each kind of attention does to queries, keys and values before the recurrence.

Owns the map (q, k, v, position) → (q′, k′, v′), the key width it leads to and whether the outputs
are divided by a denominator. Knows nothing of state, slots or batches: what comes out is fed to
`recurrent_step` and nothing else tells one kind of attention from another.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from engine import ops


class Features(NamedTuple):
    """Mapped queries and keys [..., N, H, K] and values [..., N, H, V]."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class TokenPositions:
    """Where the N tokens of a batch stand, worked out once per step for all layers.

    index: int64 [N], counted from 0 from the start of each token's own sequence.
    cos, sin: [N, rotary_dim / 2], the rotary angles of those positions.
    """

    index: Tensor
    cos: Tensor
    sin: Tensor


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


class FeatureMap(Protocol):
    """One kind of attention, as the recurrence sees it."""

    @property
    def mix(self) -> Mix | None:
        """Map, recurrence and gelu as one op of equal bits; None where nobody wrote one."""
        ...

    @property
    def has_denominator(self) -> bool:
        """Whether outputs are divided by the sum of their scores."""
        ...

    def key_width(self, head_dim: int) -> int:
        """Width K of the mapped queries and keys for heads of `head_dim`."""
        ...

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, at: TokenPositions, sigma: Tensor
    ) -> Features:
        """Map q, k, v [..., N, H, D]; sigma float64 [H] is σ(m) of the layer."""
        ...


@dataclass(frozen=True, slots=True)
class Cottention:
    """Cosine similarity (arXiv 2409.18747): rotary, q and k to unit length, v over its position.

    q′ = N(q), k′ = N(k), v′ = v / j^σ(m) with j the token's position counted from 1 and
    N(x) = x / max(‖x‖₂, 1e-12). There is no denominator and no 1/√d.
    """

    has_denominator: bool = False
    mix: Mix | None = ops.cottention_mix

    def key_width(self, head_dim: int) -> int:
        return head_dim

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, at: TokenPositions, sigma: Tensor
    ) -> Features:
        return Features(*ops.cottention_features(q, k, v, at.index, sigma, at.cos, at.sin))


FEATURE_MAPS: dict[str, FeatureMap] = {"cottention": Cottention()}

"""The linear transformer (arXiv 2006.16236)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from cottention.engine.models.gptj.feature_maps.base import (
    FeatureMap,
    FusedAttention,
    TokenPositions,
)
from cottention.engine.models.gptj.feature_maps.on_cuda import MappedAttention

if TYPE_CHECKING:
    from torch import Tensor


class Linear(FeatureMap):
    """φ(x) = elu(x) + 1, with denominator. Rotary is applied before φ: scores stay positive."""

    description: ClassVar[str] = (
        "causal linear transformer (arXiv 2006.16236: elu + 1 in place of softmax)"
    )
    has_denominator: ClassVar[bool] = True

    def features(
        self,
        q: "Tensor",
        k: "Tensor",
        v: "Tensor",
        at: TokenPositions,
        _weights: Sequence["Tensor"],
    ) -> "tuple[Tensor, Tensor, Tensor]":
        from cottention.engine import ops

        q, k = (ops.elu_plus_one(ops.rotate(x, at.cos, at.sin)) for x in (q, k))
        return q, k, v

    @property
    def fused_attention(self) -> FusedAttention:
        return MappedAttention("linear")

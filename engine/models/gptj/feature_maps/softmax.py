"""Softmax attention, which has no recurrent form: for comparison in training and benchmarks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from cottention.engine.models.gptj.feature_maps.base import FeatureMap, TokenPositions

if TYPE_CHECKING:
    from torch import Tensor


class Softmax(FeatureMap):
    """Rotary alone: training and benchmarks compute the attention."""

    description: ClassVar[str] = "causal transformer with softmax attention"
    is_recurrent: ClassVar[bool] = False

    def features(
        self,
        q: "Tensor",
        k: "Tensor",
        v: "Tensor",
        at: TokenPositions,
        _weights: Sequence["Tensor"],
    ) -> "tuple[Tensor, Tensor, Tensor]":
        from cottention.engine import ops

        return ops.rotate(q, at.cos, at.sin), ops.rotate(k, at.cos, at.sin), v

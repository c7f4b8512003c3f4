"""cosFormer (arXiv 2202.08791): ReLU features, weighted by the cosine of the distance."""

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from cottention.engine.models.gptj.feature_maps.base import (
    AttentionConfig,
    FeatureMap,
    FusedAttention,
    TokenPositions,
)
from cottention.engine.models.gptj.feature_maps.on_cuda import MappedAttention

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class CosFormer(FeatureMap):
    """ReLU features, weighted by the cosine of the distance, with denominator.

    φ_t(x) = [ReLU(x) sin(πt/2M); ReLU(x) cos(πt/2M)] on queries and keys, t counted from 1 and M
    fixed, so that φ_i(q)·φ_j(k) = ReLU(q)·ReLU(k) cos(π(i − j)/2M). No 1/√d. Rotary, where a model
    has it, is applied before the ReLU, in place of the position embeddings of the paper's models.
    """

    description: ClassVar[str] = (
        "causal cosFormer (arXiv 2202.08791: ReLU reweighted by the cosine of the distance)"
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
        import torch

        from cottention.engine import ops

        assert at.table is not None
        sin, cos = at.table.to(q.dtype).unsqueeze(-2).split(1, dim=-1)  # [N, 1, 1]
        q, k = (torch.relu(ops.rotate(x, at.cos, at.sin)) for x in (q, k))
        q, k = (torch.cat([x * sin, x * cos], dim=-1) for x in (q, k))
        return q, k, v

    def key_width(self, config: AttentionConfig) -> int:
        return 2 * config.head_dim

    def max_exact_length(self, config: AttentionConfig) -> int:
        """M: weights of tokens further apart would be negative."""
        return config.cosformer_max_length or config.n_positions

    def position_table(
        self, config: AttentionConfig, positions: "Tensor", dtype: "torch.dtype"
    ) -> "Tensor":
        """Sine and cosine of πt/2M with t = position + 1: [N, 2].

        Raises IndexError, on a CPU, for a position at or beyond M.
        """
        return half_wave(self.max_exact_length(config), dtype, positions.device)[positions]

    @property
    def fused_attention(self) -> FusedAttention:
        return MappedAttention("cosformer")


@functools.cache
def half_wave(max_length: int, dtype: "torch.dtype", device: "torch.device") -> "Tensor":
    """Sine and cosine of π·t/2M for t from 1 to M: [M, 2].

    Computed one by one in Python's float64: the last bit of torch's sines may depend on the number
    of elements.
    """
    import torch

    angles = [math.pi / 2 * t / max_length for t in range(1, max_length + 1)]
    pairs = [[math.sin(angle), math.cos(angle)] for angle in angles]
    with torch.inference_mode(False):  # the cached table is used in training, too
        return torch.tensor(pairs, dtype=torch.float64).to(device, dtype)

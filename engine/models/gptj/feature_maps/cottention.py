"""Cottention (arXiv 2409.18747): cosine similarity, stabilised by one learned scalar per head."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from cottention.engine.models.gptj.feature_maps.base import (
    AttentionConfig,
    FeatureMap,
    FusedAttention,
    FusedLayers,
    TokenPositions,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cottention.engine.models.recurrence import Recurrence

INITIAL_SIGMA = 0.1, 0.6
"""σ(m) of the first and last head of a layer. Heads with equal values hardly diverge."""


class Cottention(FeatureMap):
    """Cosine similarity: q and k of unit length, v divided by a power of the position.

    After rotary, q′ = N(q), k′ = N(k), v′ = v / j^σ(m), with j the token's position from 1 and
    N(x) = x / max(‖x‖₂, 1e-12) (eq. 5). There is no denominator and no 1/√d. The layer's weights
    are σ(m), float64 [H]; the state dict has m as `norm_const` [1, H, 1, 1].
    """

    description: ClassVar[str] = (
        "causal Cottention model (arXiv 2409.18747: cosine similarity in place of softmax)"
    )
    weight_names: ClassVar[tuple[str, ...]] = ("norm_const",)
    delays_updates: ClassVar[bool] = True

    def features(
        self, q: "Tensor", k: "Tensor", v: "Tensor", at: TokenPositions, weights: Sequence["Tensor"]
    ) -> "tuple[Tensor, Tensor, Tensor]":
        from cottention.engine import ops

        (sigma,) = weights
        return ops.cottention_features(q, k, v, at.index, sigma, at.cos, at.sin)

    def add_weights(self, attention: "nn.Module", config: AttentionConfig) -> None:
        """m of which σ(m) is evenly spaced over the heads, from 0.1 to 0.6."""
        import torch
        from torch import nn

        m = torch.linspace(*INITIAL_SIGMA, config.n_head, device="cpu").logit()
        attention.register_parameter("norm_const", nn.Parameter(m.view(1, -1, 1, 1)))

    def prepared_weights(self, attention: "nn.Module") -> "tuple[Tensor, ...]":
        import torch

        return (torch.sigmoid(attention.get_parameter("norm_const").double()).flatten(),)

    @property
    def fused_attention(self) -> FusedAttention:
        return _fused_attention

    @property
    def fused_layers(self) -> FusedLayers:
        return _fused_layers


def _fused_attention(
    _normed: "Tensor",
    joined: "Tensor",
    at: TokenPositions,
    weights: Sequence["Tensor"],
    recurrence: "Recurrence",
    layer: int,
    out: "Tensor",
) -> None:
    from cottention.engine import ops

    (sigma,) = weights
    state, _ = recurrence.layer(layer)
    rows, inputs = recurrence.segments, (joined, at.index, sigma, at.cos, at.sin, state)
    if recurrence.delayed is not None:
        ops.cottention_delayed_gelu(
            *inputs,
            updates=recurrence.delayed.layer(layer),
            state_indices=rows.state_indices,
            out=out,
        )
    elif rows.pieces is None:
        ops.cottention_attention_gelu(*inputs, rows.state_indices, rows.cu_seqlens, out)
    else:
        ops.cottention_pieces_gelu(*inputs, pieces=rows.pieces, num_cut=rows.num_cut, out=out)


def _fused_layers(
    x: "Tensor",
    weights: Sequence["Tensor"],
    epsilon: float,
    at: TokenPositions,
    recurrence: "Recurrence",
    buffers: Sequence["Tensor"],
) -> None:
    from cottention.engine import ops

    rows = recurrence.state, recurrence.segments.state_indices, recurrence.segments.cu_seqlens
    ops.cottention_layers(x, weights, epsilon, at.index, at.cos, at.sin, *rows, *buffers)

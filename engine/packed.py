"""The layers on a CPU with compiled ops: packed weights, activations in float32, buffers that stay.

Owns a layer's four calls (norm, first product, all that is between, second product added to the
residual) and the buffers between them. Does not know embeddings or logits. A feature map without a
compiled `mix` takes its three ops one after the other.

Letters: N tokens, C channels.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from engine import ops
from engine.feature_maps import FEATURE_MAPS
from engine.model import Block, split_heads
from engine.model_config import ModelConfig
from engine.positions import TokenPositions
from engine.recurrence import Recurrence


class PackedLayers:
    """All blocks of a model; a row's bits do not depend on the rows beside it."""

    def __init__(self, config: ModelConfig, _device: str, blocks: Iterable[Block]) -> None:
        self._layers = [PackedLayer(config, index, block) for index, block in enumerate(blocks)]
        width, inner = config.n_embd, config.n_inner
        self._buffers = [torch.empty(0, n) for n in (width, 3 * width + inner, width + inner)]

    def __call__(self, x: Tensor, at: TokenPositions, recurrence: Recurrence) -> Tensor:
        """x float32 [N, C] after the last block, changed in place."""
        buffers = self._rows(x.shape[0])
        for layer in self._layers:
            layer.add_to(x, at, recurrence, *buffers)
        return x

    def _rows(self, num_tokens: int) -> list[Tensor]:
        """Buffers [N, ·], kept from step to step; they grow to the largest batch that came."""
        if num_tokens > len(self._buffers[0]):
            self._buffers = [torch.empty(num_tokens, x.shape[1]) for x in self._buffers]
        return [buffer[:num_tokens] for buffer in self._buffers]


class PackedLayer:
    """One block."""

    def __init__(self, config: ModelConfig, index: int, block: Block) -> None:
        self._config = config
        self._index = index
        self._norm = ops.FixedOrderNorm(block.ln_1.weight, block.ln_1.bias, block.ln_1.eps)
        self._project_in = ops.FixedOrderLinear(*block.stacked_in())
        self._project_out = ops.FixedOrderLinear(*block.stacked_out())
        self._sigma = block.attn.sigma()
        fits = ops.kernel_has_width(config.head_dim, config.head_dim)
        self._mix = FEATURE_MAPS[config.attention_type].mix if fits else None

    def add_to(
        self,
        x: Tensor,
        at: TokenPositions,
        recurrence: Recurrence,
        normed: Tensor,
        joined: Tensor,
        mixed: Tensor,
    ) -> None:
        """Add to x [N, C] what attention and MLP make of it.

        normed [N, C], joined [N, 3C + inner] and mixed [N, C + inner] are overwritten.
        """
        self._norm.into(x, normed)
        self._project_in.into(normed, joined)
        if self._mix is None:
            self._mix_apart(joined, at, recurrence, mixed)
        else:
            state, _ = recurrence.layer(self._index)
            slots, offsets = recurrence.segments.slots, recurrence.segments.offsets
            self._mix(joined, at.index, self._sigma, at.cos, at.sin, state, slots, offsets, mixed)
        self._project_out.add_to(mixed, x)

    def _mix_apart(
        self, joined: Tensor, at: TokenPositions, recurrence: Recurrence, mixed: Tensor
    ) -> None:
        features, up = split_heads(self._config, joined, self._sigma, at)
        out = recurrence(self._index, features).flatten(-2)
        torch.cat([out, ops.gelu_new(up)], dim=-1, out=mixed)

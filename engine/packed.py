"""The layers on a CPU with compiled ops: packed weights, activations in float32, buffers that stay.

Owns the packed weights and the buffers between a block's parts (norm, first product, all that is
between, second product added to the residual), which are one op for all blocks where the feature
map has such an op, and an op each where it has none. Does not know embeddings or logits.

Letters: N tokens, C channels.
"""

from collections.abc import Iterable

import torch
from cottention.engine import ops
from cottention.engine.feature_maps import FEATURE_MAPS
from cottention.engine.model import Block, split_heads
from cottention.engine.model_config import ModelConfig
from cottention.engine.positions import TokenPositions
from cottention.engine.recurrence import Recurrence
from torch import Tensor


class PackedLayers:
    """All blocks of a model; a row's bits do not depend on the rows beside it."""

    def __init__(self, config: ModelConfig, _device: str, blocks: Iterable[Block]) -> None:
        self._layers = [PackedLayer(config, index, block) for index, block in enumerate(blocks)]
        self._weights = [weight for layer in self._layers for weight in layer.weights()]
        self._epsilon = config.layer_norm_epsilon
        fits = ops.kernel_has_width(config.head_dim, config.head_dim)
        self._in_one = FEATURE_MAPS[config.attention_type].layers if fits else None
        width, inner = config.n_embd, config.n_inner
        self._buffers = [torch.empty(0, n) for n in (width, 3 * width + inner, width + inner)]

    def __call__(self, x: Tensor, at: TokenPositions, recurrence: Recurrence) -> Tensor:
        """x float32 [N, C] after the last block, changed in place."""
        buffers = self._rows(x.shape[0])
        if self._in_one is None:
            for layer in self._layers:
                layer.add_to(x, at, recurrence, *buffers)
            return x
        places = at.index, at.cos, at.sin
        rows = recurrence.state, recurrence.segments.slots, recurrence.segments.offsets
        self._in_one(x, self._weights, self._epsilon, *places, *rows, *buffers)
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

    def weights(self) -> Iterable[Tensor]:
        """In the order of `ops.cottention_layers`."""
        first, second = self._project_in, self._project_out
        assert first.bias is not None
        assert second.bias is not None
        yield from (self._norm.weight, self._norm.bias, first.weight, first.bias)
        yield from (self._sigma, second.weight, second.bias)

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
        features, up = split_heads(self._config, joined, self._sigma, at)
        out = recurrence(self._index, features).flatten(-2)
        torch.cat([out, ops.gelu_new(up)], dim=-1, out=mixed)
        self._project_out.add_to(mixed, x)

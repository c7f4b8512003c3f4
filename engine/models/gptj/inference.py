"""A GPT-J as it is served: in each layer two matrix products with the recurrence between them.

`PackedLayers` has the layers on a CPU with compiled ops: packed weights, activations in float32,
buffers that are kept from step to step. `TorchLayers` has them in torch's own operations, on any
device and in any type. Both compute what `model.py` defines.

Letters: N tokens, R rows, C channels.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from cottention.engine import ops
from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.gptj.feature_maps.base import FusedAttention, TokenPositions
from cottention.engine.models.gptj.model import (
    Block,
    CottentionForCausalLM,
    split_heads,
    token_positions,
)
from cottention.engine.models.recurrence import Recurrence

Product = Callable[[Tensor], Tensor]
"""x [N, in] → [N, out]."""


class Layers(Protocol):
    """All blocks of a model, in order."""

    def __call__(self, x: Tensor, at: TokenPositions, recurrence: Recurrence) -> Tensor:
        """x [N, C] → x after the last block; the batch's rows of every layer are updated."""
        ...


class ServedGPTJ:
    """A `CottentionForCausalLM` arranged for inference.

    The weights are moved out of the model block by block, so that they are in memory once.
    """

    def __init__(self, model: CottentionForCausalLM, device: str) -> None:
        self.config: GPTJConfig = model.config
        # a copy: the original may be a view of the weights file, which would remain mapped
        self._embedding = model.transformer.wte.weight.to(device, copy=True)
        del model.transformer.wte
        weight = model.lm_head.weight
        self._is_packed = device == "cpu" and ops.can_pack(weight)
        kind = PackedLayers if self._is_packed else TorchLayers
        self._layers: Layers = kind(self.config, device, model.take_blocks())
        self._last_norm = self._norm(model.transformer.ln_f.to(device))
        bias = model.lm_head.bias
        if device == "cpu":
            self._head = product(weight, bias, device)
        else:
            self._head = partial(ops.wide_product, weight=weight.to(device), bias=bias.to(device))
        del model.lm_head

    @property
    def delays_updates(self) -> bool:
        """Whether a step of one token for each row can delay what it adds to their states."""
        is_fused = isinstance(self._layers, TorchLayers) and self._layers.is_fused
        return is_fused and self.config.feature_map.delays_updates

    def hidden(self, ids: Tensor, positions: Tensor, recurrence: Recurrence) -> Tensor:
        """ids and positions int64 [N] → hidden states [N, C] before the last norm."""
        x = nn.functional.embedding(ids, self._embedding).float()
        return self._layers(x, token_positions(self.config, positions, x.dtype), recurrence)

    def last_hidden(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, C] before the last norm → after it, [R, C]."""
        return self._last_norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, C] → logits float32 [R, vocab_size]."""
        return self._head(self.last_hidden(hidden)).float()

    def _norm(self, norm: nn.LayerNorm) -> Product:
        if self._is_packed:
            return ops.FixedOrderNorm(norm.weight, norm.bias, norm.eps)
        return norm.float()


@dataclass(frozen=True, slots=True)
class TorchLayer:
    """One block: its norm, both stacked products of weights `dtype`, the feature map's own."""

    norm: nn.LayerNorm
    dtype: torch.dtype
    project_in: Product
    map_weights: tuple[Tensor, ...]
    project_out: Product


class TorchLayers:
    """The layers in torch's own operations, on any device and in any type.

    What goes from layer to layer and the norms are float32, products have the weights' type.
    On CUDA compiled ops compute all between the two products, so that a layer is few kernels
    whatever the batch: sum and norm, two products, and one to four between them.
    """

    def __init__(self, config: GPTJConfig, device: str, blocks: Iterable[Block]) -> None:
        self._config = config
        self._layers = [_torch_layer(block, device) for block in blocks]
        attention = config.feature_map
        widths = attention.key_width(config), attention.value_width(config)
        fits = ops.can_fuse_attention(device, config.head_dim) and ops.kernel_has_width(*widths)
        self._fused: FusedAttention | None = attention.fused_attention if fits else None
        is_rounded = self._layers and self._fused is not None and not attention.reads_input
        self._normed_dtype = self._layers[0].dtype if is_rounded else torch.float32

    @property
    def is_fused(self) -> bool:
        """Whether compiled ops compute all between the two products of a layer."""
        return self._fused is not None

    def __call__(self, x: Tensor, at: TokenPositions, recurrence: Recurrence) -> Tensor:
        added: Tensor | None = None
        for index, layer in enumerate(self._layers):
            normed = ops.add_layer_norm(
                x, added, layer.norm.weight, layer.norm.bias, layer.norm.eps, self._normed_dtype
            )
            joined = layer.project_in(normed)
            if self._fused is None:
                between = self._in_torch(index, normed, joined, at, recurrence)
            else:
                between = joined.new_empty(len(joined), joined.shape[1] - 2 * self._config.n_embd)
                self._fused(normed, joined, at, layer.map_weights, recurrence, index, between)
            added = layer.project_out(between)
        return x if added is None else x.add_(added)

    def _in_torch(
        self,
        index: int,
        normed: Tensor,
        joined: Tensor,
        at: TokenPositions,
        recurrence: Recurrence,
    ) -> Tensor:
        """First product [N, 3C + inner] of normed [N, C] → input of the second, [N, C + inner]."""
        weights = self._layers[index].map_weights
        features, up = split_heads(self._config, normed, joined, weights, at)
        mixed = self._config.feature_map.outputs(recurrence(index, features))
        return torch.cat([mixed.flatten(-2).to(up.dtype), ops.gelu_new(up)], dim=-1)


def _torch_layer(block: Block, device: str) -> TorchLayer:
    return TorchLayer(
        dtype=block.mlp.fc_in.weight.dtype,
        norm=block.ln_1.to(device).float(),
        project_in=product(*block.stacked_in(), device),
        map_weights=tuple(weight.to(device) for weight in block.attn.map_weights()),
        project_out=product(*block.stacked_out(), device),
    )


def product(weight: Tensor, bias: Tensor, device: str) -> Product:
    """x Wᵀ + bias on `device`. In float32 on a CPU a row's bits do not depend on other rows."""
    weight, bias = weight.to(device), bias.to(device)
    if device == "cpu" and (weight.dtype == torch.float32 or ops.can_pack(weight)):
        return ops.FixedOrderLinear(weight, bias)
    return lambda x: nn.functional.linear(x.to(weight.dtype), weight, bias)


class PackedLayers:
    """All blocks of a model on a CPU; a row's bits do not depend on other rows."""

    def __init__(self, config: GPTJConfig, _device: str, blocks: Iterable[Block]) -> None:
        self._layers = [PackedLayer(config, index, block) for index, block in enumerate(blocks)]
        self._weights = [weight for layer in self._layers for weight in layer.weights()]
        self._epsilon = config.layer_norm_epsilon
        fits = ops.fused_kernel_has_width(config.head_dim)
        self._fused = config.feature_map.fused_layers if fits else None
        width, inner = config.n_embd, config.n_inner
        self._buffers = [torch.empty(0, n) for n in (width, 3 * width + inner, width + inner)]

    def __call__(self, x: Tensor, at: TokenPositions, recurrence: Recurrence) -> Tensor:
        """x float32 [N, C] after the last block, changed in place."""
        buffers = self._rows(x.shape[0])
        if self._fused is not None:
            self._fused(x, self._weights, self._epsilon, at, recurrence, buffers)
            return x
        for layer in self._layers:
            layer.add_to(x, at, recurrence, *buffers)
        return x

    def _rows(self, num_tokens: int) -> list[Tensor]:
        """Buffers [N, ·], kept from step to step; they grow to the largest batch so far."""
        if num_tokens > len(self._buffers[0]):
            self._buffers = [torch.empty(num_tokens, x.shape[1]) for x in self._buffers]
        return [buffer[:num_tokens] for buffer in self._buffers]


class PackedLayer:
    """One block, with packed weights."""

    def __init__(self, config: GPTJConfig, index: int, block: Block) -> None:
        self._config = config
        self._index = index
        self._norm = ops.FixedOrderNorm(block.ln_1.weight, block.ln_1.bias, block.ln_1.eps)
        self._project_in = ops.FixedOrderLinear(*block.stacked_in())
        self._project_out = ops.FixedOrderLinear(*block.stacked_out())
        self._map_weights = block.attn.map_weights()

    def weights(self) -> Iterable[Tensor]:
        """In the order of `ops.cottention_layers`, the feature map's own in place of σ."""
        first, second = self._project_in, self._project_out
        assert first.bias is not None
        assert second.bias is not None
        yield from (self._norm.weight, self._norm.bias, first.weight, first.bias)
        yield from (*self._map_weights, second.weight, second.bias)

    def add_to(
        self,
        x: Tensor,
        at: TokenPositions,
        recurrence: Recurrence,
        normed: Tensor,
        joined: Tensor,
        mixed: Tensor,
    ) -> None:
        """Add the output of attention and MLP to x [N, C], in place.

        normed [N, C], joined [N, 3C + inner] and mixed [N, C + inner] are overwritten.
        """
        self._norm.into(x, normed)
        self._project_in.into(normed, joined)
        features, up = split_heads(self._config, normed, joined, self._map_weights, at)
        out = self._config.feature_map.outputs(recurrence(self._index, features)).flatten(-2)
        torch.cat([out, ops.gelu_new(up)], dim=-1, out=mixed)
        self._project_out.add_to(mixed, x)

"""The model as it is served: each layer two matrix products with the recurrence between them.

Owns the way from ids to logits and the choice of who computes the layers: `packed.py` where there
are compiled ops for it, torch elsewhere. Computes what `model.py` defines; does not know where
state lives, who the tokens belong to or what becomes of the logits.

Letters: N tokens, R rows, C channels.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from engine import ops
from engine.config import ModelConfig
from engine.feature_maps import TokenPositions
from engine.model import Block, CottentionForCausalLM, split_heads, token_positions
from engine.packed import PackedLayers
from engine.recurrence import Recurrence

Product = Callable[[Tensor], Tensor]
"""x [N, in] → [N, out]."""


class Layers(Protocol):
    """All blocks of a model, in order."""

    def __call__(self, x: Tensor, at: TokenPositions, recurrence: Recurrence) -> Tensor:
        """x [N, C] after the last block; the batch's rows of every layer move on."""
        ...


class ServedModel:
    """A `CottentionForCausalLM` rearranged for inference.

    Takes the weights of what it is given, one block at a time, and leaves it without them.
    """

    def __init__(self, model: CottentionForCausalLM, device: str) -> None:
        self.config: ModelConfig = model.config
        self._embedding = model.transformer.wte.to(device)
        weight = model.lm_head.weight
        self._is_packed = device == "cpu" and ops.can_pack(weight)
        kind = PackedLayers if self._is_packed else TorchLayers
        self._layers: Layers = kind(self.config, device, model.take_blocks())
        self._last_norm = self._norm(model.transformer.ln_f.to(device))
        self._head = product(weight, model.lm_head.bias, device)
        del model.lm_head

    def hidden(self, ids: Tensor, positions: Tensor, recurrence: Recurrence) -> Tensor:
        """ids and positions int64 [N] → hidden states [N, C] before the last norm."""
        x: Tensor = self._embedding(ids)
        x = x.float() if self._is_packed else x
        return self._layers(x, token_positions(self.config, positions, x.dtype), recurrence)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, C] → logits float32 [R, vocab_size]."""
        return self._head(self._last_norm(hidden)).float()

    def _norm(self, norm: nn.LayerNorm) -> Product:
        return ops.FixedOrderNorm(norm.weight, norm.bias, norm.eps) if self._is_packed else norm


@dataclass(frozen=True, slots=True)
class TorchLayer:
    """One block: its norm, both stacked products and σ(m) float64 [H]."""

    norm: nn.LayerNorm
    project_in: Product
    sigma: Tensor
    project_out: Product


class TorchLayers:
    """The layers in torch's own operations, on any device and in any type."""

    def __init__(self, config: ModelConfig, device: str, blocks: Iterable[Block]) -> None:
        self._config = config
        self._layers = [_torch_layer(block, device) for block in blocks]

    def __call__(self, x: Tensor, at: TokenPositions, recurrence: Recurrence) -> Tensor:
        for index, layer in enumerate(self._layers):
            joined = layer.project_in(layer.norm(x))
            features, up = split_heads(self._config, joined, layer.sigma, at)
            mixed = recurrence(index, features).flatten(-2).to(up.dtype)
            x = x + layer.project_out(torch.cat([mixed, ops.gelu_new(up)], dim=-1))
        return x


def _torch_layer(block: Block, device: str) -> TorchLayer:
    return TorchLayer(
        norm=block.ln_1.to(device),
        project_in=product(*block.stacked_in(), device),
        sigma=block.attn.sigma().to(device),
        project_out=product(*block.stacked_out(), device),
    )


def product(weight: Tensor, bias: Tensor, device: str) -> Product:
    """x Wᵀ + bias on `device`. In float32 on a CPU, a row's bits do not depend on its company."""
    weight, bias = weight.to(device), bias.to(device)
    if device == "cpu" and (weight.dtype == torch.float32 or ops.can_pack(weight)):
        return ops.FixedOrderLinear(weight, bias)
    return lambda x: nn.functional.linear(x, weight, bias)

"""The model as it is served: each layer two matrix products with the recurrence between them.

Owns the stacked weights and the product that multiplies them. Computes what `model.py` defines;
does not know where state lives, who the tokens belong to or what becomes of the logits.

Letters: N tokens, R rows, C channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine import ops
from engine.config import ModelConfig
from engine.feature_maps import TokenPositions
from engine.model import Attend, Block, CottentionForCausalLM, split_heads, token_positions

Product = Callable[[Tensor], Tensor]
"""x [N, in] → x Wᵀ + b [N, out]."""


@dataclass(frozen=True, slots=True)
class ServedLayer:
    """One block: its norm, both stacked products and σ(m) float64 [H]."""

    norm: nn.LayerNorm
    project_in: Product
    sigma: Tensor
    project_out: Product


class ServedModel:
    """A `CottentionForCausalLM` rearranged for inference. Takes the weights of what it is given."""

    def __init__(self, model: CottentionForCausalLM, device: str) -> None:
        self.config: ModelConfig = model.config
        self._device = device
        self._embedding = model.transformer.wte.to(device)
        self._layers = [self._serve(block) for block in model.blocks()]
        self._last_norm = model.transformer.ln_f.to(device)
        self._head = self._product(model.lm_head.weight, model.lm_head.bias)

    def hidden(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """ids and positions int64 [N] → hidden states [N, C] before the last norm."""
        x: Tensor = self._embedding(ids)
        at = token_positions(self.config, positions, x.dtype)
        for index, layer in enumerate(self._layers):
            x = x + self._mixed(layer, index, x, at, attend)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, C] → logits float32 [R, vocab_size]."""
        return self._head(self._last_norm(hidden)).float()

    def _mixed(
        self, layer: ServedLayer, index: int, x: Tensor, at: TokenPositions, attend: Attend
    ) -> Tensor:
        """What attention and MLP of one layer add to x [N, C]."""
        joined = layer.project_in(layer.norm(x))
        features, up = split_heads(self.config, joined, layer.sigma, at)
        mixed = attend(index, features).flatten(-2).to(up.dtype)
        return layer.project_out(torch.cat([mixed, ops.gelu_new(up)], dim=-1))

    def _serve(self, block: Block) -> ServedLayer:
        return ServedLayer(
            norm=block.ln_1.to(self._device),
            project_in=self._product(*block.stacked_in()),
            sigma=block.attn.sigma().to(self._device),
            project_out=self._product(*block.stacked_out()),
        )

    def _product(self, weight: Tensor, bias: Tensor) -> Product:
        """In float32 on a CPU, a row's bits must not depend on the rows beside it."""
        weight, bias = weight.to(self._device), bias.to(self._device)
        if self._device == "cpu" and weight.dtype == torch.float32:
            return ops.FixedOrderLinear(weight, bias)
        return lambda x: nn.functional.linear(x, weight, bias)

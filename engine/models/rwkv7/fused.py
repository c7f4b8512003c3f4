"""The blocks of a served RWKV-7 as one call of a compiled op, with the bits of `blocks.py`.

Letters: N tokens, C channels, H heads, D head width.
"""

from collections.abc import Iterable, Sequence
from typing import Self

import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.models.recurrence import Recurrence
from cottention.engine.models.recurrent_model import Product
from cottention.engine.models.rwkv7.blocks import LowRank, RWKV7Block
from cottention.engine.models.rwkv7.config import RWKV7Config


class FusedBlocks:
    """`ops.rwkv7_layers` on the weights of a model's blocks."""

    def __init__(
        self, config: RWKV7Config, weights: Sequence[Tensor], ranks: Sequence[int]
    ) -> None:
        self._config = config
        self._weights = weights
        self._ranks = ranks

    @classmethod
    def of(cls, config: RWKV7Config, blocks: Sequence[RWKV7Block]) -> Self | None:
        """For blocks that are served; None if the op does not take their weights or widths."""
        ranks, width = config.low_ranks, config.head_dim
        if ranks is None or not ops.kernel_has_width(width, width):
            return None
        weights = [weight for block in blocks for weight in _weights_of(block, config)]
        if any(weight is None for weight in weights):
            return None
        packed = [weight.detach() for weight in weights if weight is not None]
        return cls(config, packed, (ranks.w, ranks.a, ranks.g, ranks.v))

    def __call__(self, x: Tensor, recurrence: Recurrence) -> Tensor:
        """x float32 [N, C] before the first block → after the last one, in place."""
        config, pool, rows = self._config, recurrence.tensors, recurrence.segments
        ops.rwkv7_layers(
            x,
            self._weights,
            config.norm_eps,
            config.group_norm_eps,
            self._ranks,
            config.intermediate_size,
            pool["state"],
            pool["att_shift"],
            pool["ffn_shift"],
            rows.state_indices,
            rows.cu_seqlens,
        )
        return x


def _weights_of(block: RWKV7Block, config: RWKV7Config) -> Iterable[Tensor | None]:
    """In the order of the op; None for a product whose weights are not packed."""
    attn, ffn, heads = block.attn, block.ffn, (config.num_heads, config.head_dim)
    yield from (block.attn_norm.weight, _or_zeros(block.attn_norm.bias, block.attn_norm.weight))
    yield torch.stack([getattr(attn, f"x_{name}").flatten() for name in "rwkvag"])
    for product in (attn.project_r, attn.project_k, attn.project_v, attn.project_out):
        yield _packed(product)
    yield from (*_low_rank(attn.w_lora), *_low_rank(attn.a_lora), *_low_rank(attn.g_lora)[:2])
    yield from _low_rank(attn.v_lora or attn.a_lora)  # the first block has none and uses none
    norm = attn.g_norm
    for weight in (attn.k_k, attn.k_a, attn.r_k, norm.weight, _or_zeros(norm.bias, norm.weight)):
        yield weight.view(heads)
    yield from (block.ffn_norm.weight, _or_zeros(block.ffn_norm.bias, block.ffn_norm.weight))
    yield ffn.x_k.view(1, -1)
    yield from (_packed(ffn.project_in), _packed(ffn.project_out))


def _low_rank(product: LowRank) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    up = product.up.packed
    return _packed(product.down), _packed(product.up), None if up is None else up.bias


def _packed(product: Product) -> Tensor | None:
    return None if product.packed is None else product.packed.weight


def _or_zeros(bias: Tensor | None, weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if bias is None else bias

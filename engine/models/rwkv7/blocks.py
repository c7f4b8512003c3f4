"""The blocks of RWKV-7 (arXiv 2503.14456, sec. 4): time mixing and channel mixing, in any dtype.

Letters: N tokens, C channels, H heads, D head width (both of keys and of values).
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

from cottention.engine import ops
from cottention.engine.models.recurrence import Features, Recurrence
from cottention.engine.models.recurrent_model import (
    Product,
    RecurrentBlock,
    Servable,
)
from cottention.engine.models.rwkv7.config import LowRanks, RWKV7Config
from cottention.engine.models.tails import TokenShift

DECAY_SCALE = -math.exp(-0.5)
"""w = exp(−e^(−1/2) σ(·)): a decay is in (0.545, 1)."""

UNIT_FLOOR = 1e-12
"""Least length by which a removal key is divided."""


class LayerNorm(nn.Module):
    """(x − mean) / √(variance + ε) · weight + bias, over each of `groups` parts of a row."""

    def __init__(self, width: int, epsilon: float, *, groups: int = 1, has_bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if has_bias else None
        self._groups = groups
        self._epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C] → [N, C]."""
        bias = x.new_zeros(x.shape[-1]) if self.bias is None else self.bias
        if self._groups == 1:
            return ops.layer_norm(x, self.weight, bias, self._epsilon)
        parts = x.reshape(-1, x.shape[-1] // self._groups)
        width = parts.shape[-1]
        parts = ops.layer_norm(parts, x.new_ones(width), x.new_zeros(width), self._epsilon)
        return parts.view(x.shape) * self.weight + bias


class LowRank(nn.Module):
    """lora.2(f(lora.0(x))): a product of low rank, with some f between its two parts."""

    def __init__(self, width: int, rank: int, *, has_bias: bool) -> None:
        super().__init__()
        outer = nn.Linear(rank, width, bias=has_bias)
        self.lora = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Identity(), outer)
        self.down, self.up = Product(cast(nn.Linear, self.lora[0])), Product(outer)

    @property
    def parts(self) -> list[Servable]:
        return [self.down, self.up]


class TimeMixing(nn.Module):
    """The recurrence with a decay per key, and a removal and a replacement key (eq. 4 to 18)."""

    def __init__(self, config: RWKV7Config, index: int) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_heads
        ranks = config.low_ranks or LowRanks(1, 1, 1, 1)
        self._heads, self._width = heads, config.head_dim
        for name in "rwkvag":
            self.register_parameter(f"x_{name}", nn.Parameter(torch.zeros(width)))
        self.k_k, self.k_a = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.r_k = nn.Parameter(torch.zeros(heads, config.head_dim))
        self.r_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.w_lora = LowRank(width, ranks.w, has_bias=True)
        self.a_lora = LowRank(width, ranks.a, has_bias=True)
        self.g_lora = LowRank(width, ranks.g, has_bias=False)
        self.v_lora = LowRank(width, ranks.v, has_bias=True) if index else None
        self.g_norm = LayerNorm(width, config.group_norm_eps, groups=heads)
        self.project_r, self.project_k = Product(self.r_proj), Product(self.k_proj)
        self.project_v, self.project_out = Product(self.v_proj), Product(self.o_proj)
        low_ranks = [self.w_lora, self.a_lora, self.g_lora, self.v_lora]
        self.parts: list[Servable] = [
            *(self.project_r, self.project_k, self.project_v, self.project_out),
            *(part for each in low_ranks if each is not None for part in each.parts),
        ]

    def forward(
        self, y: Tensor, before: Tensor, v_first: Tensor | None, index: int, recurrence: Recurrence
    ) -> tuple[Tensor, Tensor]:
        """y and the rows before [N, C] → output [N, C], and the values of the first layer [N, C].

        v_first: the first layer's values before they are mixed; None in that layer.
        """
        change = before - y
        r, w, k, v, a, g = (y + change * getattr(self, f"x_{name}") for name in "rwkvag")
        r, k, v_own = self.project_r(r), self.project_k(k), self.project_v(v)
        w = ops.exp(DECAY_SCALE * ops.sigmoid(self.w_lora.up(ops.tanh(self.w_lora.down(w)))))
        a = ops.sigmoid(self.a_lora.up(self.a_lora.down(a)))
        g = self.g_lora.up(ops.sigmoid(self.g_lora.down(g)))
        mixed = v_first = v_own if v_first is None else v_first
        if self.v_lora is not None:
            mix = ops.sigmoid(self.v_lora.up(self.v_lora.down(v)))
            mixed = v_own + (v_first - v_own) * mix
        removed = self._unit(k * self.k_k)
        k = k * (1 + (a - 1) * self.k_a)
        features = (self._heads_of(x) for x in (r, k, mixed, w, -removed, removed * a))
        out = self.g_norm(recurrence(index, Features(*features)).flatten(-2))
        bonus = ops.row_sums((r * k * self.r_k.flatten()).view(-1, self._width))
        out = out + (bonus.view(-1, self._heads, 1) * self._heads_of(mixed)).flatten(-2)
        return self.project_out(out * g), v_first

    def _heads_of(self, x: Tensor) -> Tensor:
        """[N, C] → [N, H, D]."""
        return x.view(len(x), self._heads, self._width)

    def _unit(self, x: Tensor) -> Tensor:
        """Each head's part of x [N, C] by its length: x / √(Σ x² + floor²)."""
        weight = x.new_full((x.shape[-1],), self._width**-0.5)
        return ops.rms_norm(x, weight, UNIT_FLOOR**2 / self._width, self._heads)


class ChannelMixing(nn.Module):
    """value(relu(key(s))²), with s between a token's row and the one before (eq. 19 and 20)."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.zeros(config.hidden_size))
        self.key = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.value = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.project_in, self.project_out = Product(self.key), Product(self.value)
        self.parts: list[Servable] = [self.project_in, self.project_out]

    def forward(self, y: Tensor, before: Tensor) -> Tensor:
        """y and the rows before [N, C] → [N, C]."""
        inner = torch.relu(self.project_in(y + (before - y) * self.x_k))
        return self.project_out(inner * inner)


class RWKV7Block(RecurrentBlock[None]):
    """Time mixing and channel mixing, each on a norm of the residual.

    pre_norm is that of the embeddings, whose weights published files have in the first block.
    """

    def __init__(self, config: RWKV7Config, index: int) -> None:
        super().__init__()
        self.pre_norm: LayerNorm | None = None
        if index == 0 and config.norm_first:
            self.pre_norm = block_norm(config)
        self.attn_norm, self.ffn_norm = block_norm(config), block_norm(config)
        self.attn = TimeMixing(config, index)
        self.ffn = ChannelMixing(config)
        self.parts = [*self.attn.parts, *self.ffn.parts]

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None,
        index: int,
        recurrence: Recurrence,
        shift: TokenShift,
    ) -> tuple[Tensor, Tensor]:
        """x [N, C] before layer `index` → x after it, and the first layer's values [N, C]."""
        y = self.attn_norm(x)
        before = shift(y, recurrence.tensors["att_shift"][:, index])
        out, v_first = self.attn(y, before, v_first, index, recurrence)
        x = x + out
        y = self.ffn_norm(x)
        before = shift(y, recurrence.tensors["ffn_shift"][:, index])
        return x + self.ffn(y, before), v_first


def block_norm(config: RWKV7Config) -> LayerNorm:
    """The norm before a block's two parts, and after the last block."""
    return LayerNorm(config.hidden_size, config.norm_eps, has_bias=config.norm_bias)

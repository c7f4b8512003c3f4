"""The frame of flash-linear-attention's models, with one of the mixers in each layer.

Letters: N tokens, C channels, L layers, H heads, K key width.
"""

import re
from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor, nn

from cottention.engine import ops
from cottention.engine.models.fla.config import FLAConfig, HGRN2Config, RetNetConfig
from cottention.engine.models.fla.mixers import MIXERS, ROTARY_BASE, StepTables, linear
from cottention.engine.models.recurrence import Recurrence
from cottention.engine.models.recurrent_model import (
    Product,
    RecurrentBlock,
    RecurrentModel,
    RMSNorm,
    Trunk,
    with_tied_head,
)


class GatedMLP(nn.Module):
    """down(silu(gate(y)) ∘ up(y))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = linear(width, inner)
        self.up_proj = linear(width, inner)
        self.down_proj = linear(inner, width)
        self.project_in = Product(self.gate_proj, self.up_proj)
        self.project_out = Product(self.down_proj)

    def forward(self, y: Tensor) -> Tensor:
        """y [N, C] → [N, C]."""
        gate, up = self.project_in(y).chunk(2, dim=-1)
        return self.project_out(ops.silu(gate) * up)


class FLABlock(RecurrentBlock[StepTables]):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: FLAConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn_norm = RMSNorm(width, config.norm_eps)
        self.attn = MIXERS[type(config)](config)
        self.mlp_norm = RMSNorm(width, config.norm_eps)
        self.mlp = GatedMLP(width, config.intermediate_size)
        self.parts = [*self.attn.parts, self.mlp.project_in, self.mlp.project_out]

    def advance(self, x: Tensor, index: int, tables: StepTables, recurrence: Recurrence) -> Tensor:
        x = x + self.attn(self.attn_norm(x), index, tables, recurrence)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class FLATrunk(Trunk):
    """With HGRN2's bounds, from which each layer's follow."""

    def __init__(self, config: FLAConfig) -> None:
        layers = [FLABlock(config) for _ in range(config.num_hidden_layers)]
        norm = RMSNorm(config.hidden_size, config.norm_eps)
        super().__init__(config.vocab_size, config.hidden_size, layers, "norm", norm)
        self.lower_bounds: nn.Parameter | None = None
        if isinstance(config, HGRN2Config) and config.use_lower_bound:
            keys = config.num_heads * config.key_width
            self.lower_bounds = nn.Parameter(torch.ones(config.num_hidden_layers, keys))


class FLAForCausalLM(RecurrentModel[StepTables]):
    """The whole model, of any of the families."""

    def __init__(self, config: FLAConfig) -> None:
        trunk = FLATrunk(config)
        super().__init__("model", trunk, is_tied=config.tie_word_embeddings)
        self._rotary_dim = config.key_width if isinstance(config, RetNetConfig) else 0
        self._lower_bounds: Tensor | None = None

    def step_tables(self, positions: Tensor, dtype: torch.dtype) -> StepTables:
        if self._rotary_dim:
            return StepTables(*ops.rotary_table(positions, self._rotary_dim, ROTARY_BASE, dtype))
        return StepTables(lower_bounds=self._bounds())

    def serve(self, device: str) -> Self:
        bounds = self._bounds()
        self._lower_bounds = None if bounds is None else bounds.to(device)
        return super().serve(device)

    def _bounds(self) -> Tensor | None:
        """HGRN2's [L, H K]: the sum of the layers' shares up to each, without the first one's."""
        stored = self.get_submodule("model").lower_bounds
        if self._lower_bounds is not None or not isinstance(stored, Tensor):
            return self._lower_bounds
        shares = stored.softmax(dim=0)
        return shares.cumsum(dim=0) - shares[0]


_FUSED_NORM = re.compile(r"(\.attn\.)g_norm_swish_gate\.weight$")


def renamed(weights: dict[str, Tensor], config: FLAConfig) -> dict[str, Tensor]:
    """The weights under one set of names, whether their norm and gate were fused or not."""
    names = {name: _FUSED_NORM.sub(r"\1g_norm.weight", name) for name in weights}
    if len({*names.values()}) == len(names):  # else both are there, and one is not expected
        weights = {names[name]: weight for name, weight in weights.items()}
    embeddings = "model.embeddings.weight"
    return with_tied_head(weights, embeddings, is_tied=config.tie_word_embeddings)


def weights_hint(_names: Iterable[str], _config: FLAConfig) -> str:
    """Nothing is known of what else they may be."""
    return ""

"""Mamba and Mamba-2 in their definition, which is also what is served, in any dtype."""

from collections.abc import Iterable
from typing import Self, cast

import torch
from torch import Tensor

from cottention.engine.models import recurrent_model
from cottention.engine.models.mamba.blocks import Mamba2Mixer, MambaBlock
from cottention.engine.models.mamba.config import ORIGINAL_FORMAT, Mamba2Config, MambaConfig
from cottention.engine.models.mamba.fused import FusedBlocks
from cottention.engine.models.recurrent_model import (
    RecurrentModel,
    RMSNorm,
    Trunk,
    with_tied_head,
)

EMBEDDINGS = "backbone.embeddings.weight"


class MambaForCausalLM(RecurrentModel[None]):
    """The whole model, of either kind."""

    def __init__(self, config: MambaConfig | Mamba2Config) -> None:
        layers = (MambaBlock(config) for _ in range(config.num_hidden_layers))
        norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        trunk = Trunk(config.vocab_size, config.hidden_size, layers, "norm_f", norm)
        super().__init__("backbone", trunk, is_tied=config.tie_word_embeddings)
        self.config = config

    def serve(self, device: str) -> Self:
        super().serve(device)
        if isinstance(self.config, Mamba2Config):
            blocks = cast(Iterable[MambaBlock], self._layers())
            parts = [(block.norm, cast(Mamba2Mixer, block.mixer)) for block in blocks]
            self.fused = FusedBlocks.of(self.config, parts)
        return self

    def step_tables(self, _positions: Tensor, _dtype: torch.dtype) -> None:
        """Nothing depends on positions."""


def weight_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """As in all recurrent families; what the decays come from is kept in float32 as well."""
    return torch.float32 if ".dt_proj." in name else recurrent_model.weight_dtype(name, dtype)


def renamed(weights: dict[str, Tensor], config: MambaConfig | Mamba2Config) -> dict[str, Tensor]:
    """The weights with a head where the model has one of its own."""
    return with_tied_head(weights, EMBEDDINGS, is_tied=config.tie_word_embeddings)


def weights_hint(names: Iterable[str], _config: MambaConfig | Mamba2Config) -> str:
    """How to convert weights that have the names of the Mamba project's own format."""
    if "backbone.embedding.weight" not in names:
        return ""
    return f". backbone.embedding.weight is a name of {ORIGINAL_FORMAT}"

"""RWKV-7 in its definition, which is also what is served, in any dtype.

Letters: N tokens, C channels.
"""

from collections.abc import Iterable
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from cottention.engine.models.recurrence import Recurrence
from cottention.engine.models.recurrent_model import RecurrentModel, Trunk
from cottention.engine.models.rwkv7.blocks import RWKV7Block, block_norm
from cottention.engine.models.rwkv7.config import RWKV7Config
from cottention.engine.models.rwkv7.fused import FusedBlocks
from cottention.engine.models.tails import TokenShift


class RWKV7ForCausalLM(RecurrentModel[None]):
    """The whole model."""

    def __init__(self, config: RWKV7Config) -> None:
        layers = (RWKV7Block(config, index) for index in range(config.num_hidden_layers))
        trunk = Trunk(config.vocab_size, config.hidden_size, layers, "norm", block_norm(config))
        super().__init__("model", trunk, is_tied=config.tie_word_embeddings)
        self.config = config

    def serve(self, device: str) -> Self:
        super().serve(device)
        self.fused = FusedBlocks.of(self.config, list(self._blocks()))
        return self

    def _blocks(self) -> Iterable[RWKV7Block]:
        return cast(Iterable[RWKV7Block], self._layers())

    def hidden(self, ids: Tensor, _positions: Tensor, recurrence: Recurrence) -> Tensor:
        x = F.embedding(ids, self._trunk.embeddings.weight)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        blocks = list(self._blocks())
        if blocks[0].pre_norm is not None:
            x = blocks[0].pre_norm(x)
        if self.fused is not None:
            return self.fused(x, recurrence)
        shift, v_first = TokenShift.of(recurrence.segments), None
        for index, layer in enumerate(blocks):
            x, v_first = layer(x, v_first, index, recurrence, shift)
        return x

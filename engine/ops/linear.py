"""A linear layer whose rows do not know each other.

Owns the choice between packed weights (compiled ops) and torch products in tiles of one height.
Knows no model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.ops.loader import backend

TILE_ROWS = 32


class FixedOrderLinear(nn.Module):
    """x Wᵀ + bias; on the CPU a row's bits do not depend on how many rows come with it.

    weight [out_features, C] and bias [out_features] or None are taken as they are, on the device
    where the layer will run: float32 on the CPU is packed for the compiled product. No gradients.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features = weight.shape[0]
        takes = weight.device.type == "cpu" and weight.dtype == torch.float32
        self.is_packed = takes and backend() == "compiled"
        weight = weight.detach()
        if self.is_packed:
            weight = torch.ops.cottention.pack_weight(weight)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C], rows any distance apart → [N, out_features]."""
        if self.is_packed:
            out: Tensor = torch.ops.cottention.linear(x, self.weight, self.bias, self.out_features)
            return out
        if x.device.type == "cpu":
            return linear_in_tiles(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def linear_in_tiles(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias by torch's product, in tiles of one height: its order of summation follows it.

    x [N, C], weight [out_features, C], bias [out_features] or None → [N, out_features].
    """
    padded = F.pad(x, (0, 0, 0, -x.shape[0] % TILE_ROWS))
    tiles = [F.linear(tile, weight, bias) for tile in padded.split(TILE_ROWS)]
    return torch.cat(tiles)[: x.shape[0]]

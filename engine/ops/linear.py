"""A linear layer and a norm whose rows do not know each other.

Owns the choice between packed weights (compiled ops) and torch products in tiles of one height.
Knows no model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cottention.engine.ops.loader import backend

TILE_ROWS = 32


class FixedOrderLinear(nn.Module):
    """x Wᵀ + bias; on the CPU a row's bits do not depend on how many rows come with it.

    weight [out_features, C] and bias [out_features] or None are taken as they are, on the device
    where the layer will run. Float32 and bfloat16 on the CPU are packed for the compiled product,
    which takes and gives float32; for bfloat16 weights it rounds x and sums in float32. No
    gradients.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features = weight.shape[0]
        self.is_packed = can_pack(weight)
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        if self.is_packed:
            weight = torch.ops.cottention.pack_weight(weight)
            bias = None if bias is None else _kept(bias)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C], rows any distance apart → [N, out_features]."""
        if self.is_packed:
            out: Tensor = torch.ops.cottention.linear(x, self.weight, self.bias, self.out_features)
            return out
        if x.device.type == "cpu":
            return linear_in_tiles(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def into(self, x: Tensor, out: Tensor) -> None:
        """As `forward`, into out [N, out_features]; packed weights only."""
        torch.ops.cottention.linear_out(x, self.weight, self.bias, out)

    def add_to(self, x: Tensor, out: Tensor) -> None:
        """As `forward`, added to what is in out [N, out_features]; packed weights only."""
        torch.ops.cottention.linear_add(x, self.weight, self.bias, out)


class FixedOrderNorm(nn.Module):
    """(x − mean) / √(variance + ε) · weight + bias along rows, by the compiled op, in float32.

    weight and bias [C], any float type, on the CPU. No gradients.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.register_buffer("weight", _kept(weight), persistent=False)
        self.register_buffer("bias", _kept(bias), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x float32 [N, C] → [N, C]."""
        out = torch.empty_like(x)
        self.into(x, out)
        return out

    def into(self, x: Tensor, out: Tensor) -> None:
        """As `forward`, into out [N, C]."""
        torch.ops.cottention.layer_norm(x, self.weight, self.bias, self.epsilon, out)


def _kept(x: Tensor) -> Tensor:
    """A float32 copy: the original may be a view of a whole file, which would stay mapped."""
    return x.detach().to(torch.float32, copy=True)


def can_pack(weight: Tensor) -> bool:
    """Whether the compiled product takes a weight of this type, here."""
    is_cpu = weight.device.type == "cpu"
    return is_cpu and weight.dtype in (torch.float32, torch.bfloat16) and backend() == "compiled"


def linear_in_tiles(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias by torch's product, in tiles of one height: its order of summation follows it.

    x [N, C], weight [out_features, C], bias [out_features] or None → [N, out_features].
    """
    padded = F.pad(x, (0, 0, 0, -x.shape[0] % TILE_ROWS))
    tiles = [F.linear(tile, weight, bias) for tile in padded.split(TILE_ROWS)]
    return torch.cat(tiles)[: x.shape[0]]

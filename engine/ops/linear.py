"""Linear layers and layer norms in which the bits of a row do not depend on the other rows.

On the CPU weights are packed for the compiled product; without compiled ops torch's product runs in
tiles of one height.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cottention.engine.ops.loader import backend, needs_gradient

TILE_ROWS = 32
_ROWS_AT_ONCE = 256

_in_eight_bits: ContextVar[bool] = ContextVar("in_eight_bits", default=False)


@contextmanager
def eight_bit_weights(wanted: bool = True) -> Iterator[None]:
    """Within it, every new `FixedOrderLinear` keeps bfloat16 weights in eight bits, if `wanted`."""
    token = _in_eight_bits.set(wanted)
    try:
        yield
    finally:
        _in_eight_bits.reset(token)


def wide_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [N, C] W[O, C]ᵀ + bias [O] → float32 or wider [N, O]; operands in the type of the weights.

    CUDA's products of 16-bit operands accumulate in float32 and here are not rounded after it.
    """
    x = x.to(weight.dtype)
    wide = torch.promote_types(weight.dtype, torch.float32)
    if weight.device.type != "cuda" or weight.dtype == wide:
        return F.linear(x, weight, bias).to(wide)
    out = torch.mm(x, weight.T, out_dtype=wide)
    return out if bias is None else out.add_(bias)


class FixedOrderLinear(nn.Module):
    """x Wᵀ + bias; on the CPU the bits of a row do not depend on the number of rows.

    weight [out_features, C] and bias [out_features] or None, on the device where the layer runs.
    Float32 and bfloat16 weights on the CPU are packed for the compiled product, which takes and
    returns float32; for bfloat16 weights it rounds x to bfloat16 and accumulates in float32.
    Float32 weights that were widened from bfloat16 are kept in half the memory, with the bits of
    the product in float32. Within `eight_bit_weights`, bfloat16 weights are quantized further, and
    so is x in the product (`reference.quantized_linear`). No gradients.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features = weight.shape[0]
        self.is_packed = can_pack(weight)
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        if self.is_packed:
            weight = _packed(weight)
            bias = None if bias is None else _float32_copy(bias)
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
        """As `forward`, written to out [N, out_features]; packed weights only."""
        torch.ops.cottention.linear_out(x, self.weight, self.bias, out)

    def add_to(self, x: Tensor, out: Tensor) -> None:
        """As `forward`, added to out [N, out_features]; packed weights only."""
        torch.ops.cottention.linear_add(x, self.weight, self.bias, out)


class FixedOrderNorm(nn.Module):
    """(x − mean) / √(variance + ε) · weight + bias along rows, by the compiled op, in float32.

    weight and bias [C], any floating-point type, on the CPU. No gradients.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.register_buffer("weight", _float32_copy(weight), persistent=False)
        self.register_buffer("bias", _float32_copy(bias), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x float32 [N, C] → [N, C]."""
        out = torch.empty_like(x)
        self.into(x, out)
        return out

    def into(self, x: Tensor, out: Tensor) -> None:
        """As `forward`, written to out [N, C]."""
        torch.ops.cottention.layer_norm(x, self.weight, self.bias, self.epsilon, out)


def _packed(weight: Tensor) -> Tensor:
    """As the compiled product takes it; int16 holds the bfloat16 bits of float32 weights.

    int8 holds quantized weights with their scales. Widening takes as long as multiplying where
    vectors are short, so there float32 is kept.
    """
    if weight.dtype == torch.bfloat16 and _in_eight_bits.get():
        quantized: Tensor = torch.ops.cottention.quantize_weight(weight.float())
        return quantized
    can_widen = weight.shape[1] % 2 == 0 and torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    if weight.dtype == torch.float32 and can_widen and _is_bfloat16(weight):
        return _pack_weight(weight.to(torch.bfloat16)).view(torch.int16)
    return _pack_weight(weight)


def _pack_weight(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.cottention.pack_weight(weight)
    return packed


def _is_bfloat16(weight: Tensor) -> bool:
    """Whether bfloat16 has every value of a float32 matrix: the lower halves of all are zero."""
    parts = weight.view(torch.int32).split(_ROWS_AT_ONCE)
    return not any(bool((part & 0xFFFF).any()) for part in parts)


def _float32_copy(x: Tensor) -> Tensor:
    """A float32 copy: the original may be a view of a mapped file, which would stay mapped."""
    return x.detach().to(torch.float32, copy=True)


def row_product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ, in the type of both whatever autocast says: [..., C] → [..., O].

    weight [O, C], or [H, O, C] with one per head for x [..., H, C]. In float32 on the CPU the bits
    of a row do not depend on the other rows, unless gradients are needed. The weight is packed in
    each call: it is small beside a layer's.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and not needs_gradient(x, weight):
        if weight.dim() == 2:
            return _fixed_product(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
        heads = x.flatten(0, -3).transpose(0, 1).contiguous()  # [H, N, C]
        out = torch.stack([_fixed_product(*each) for each in zip(heads, weight, strict=True)], 1)
        return out.view(*x.shape[:-1], -1)
    with torch.autocast(x.device.type, enabled=False):
        if weight.dim() == 2:
            return F.linear(x, weight)
        return torch.einsum("...hc,hoc->...ho", x, weight)


def _fixed_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, C], weight [O, C], float32 on the CPU → x Wᵀ [N, O], without gradients."""
    if not can_pack(weight):
        return linear_in_tiles(x, weight, None)
    out: Tensor = torch.ops.cottention.linear(x, _pack_weight(weight), None, len(weight))
    return out


def can_pack(weight: Tensor) -> bool:
    """Whether the compiled product takes this weight: float32 or bfloat16 on the CPU."""
    is_cpu = weight.device.type == "cpu"
    return is_cpu and weight.dtype in (torch.float32, torch.bfloat16) and backend() == "compiled"


def linear_in_tiles(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias in tiles of one height: torch's order of summation depends on the height.

    x [N, C], weight [out_features, C], bias [out_features] or None → [N, out_features].
    """
    padded = F.pad(x, (0, 0, 0, -x.shape[0] % TILE_ROWS))
    tiles = [F.linear(tile, weight, bias) for tile in padded.split(TILE_ROWS)]
    return torch.cat(tiles)[: x.shape[0]]

"""Linear layers and layer norms in which the bits of a row do not depend on the other rows.

On the CPU weights are packed for the compiled product; without compiled ops torch's product runs in
tiles of one height.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cottention.engine.ops.loader import backend, needs_gradient

TILE_ROWS = 32
_ROWS_AT_ONCE = 256
MAX_COMPRESSED = 0.9
"""Of the bytes of bfloat16 weights. Compressed, weights of one scale take 0.76."""


StorageKind = Literal["packed", "int8", "compressed"]


@dataclass(slots=True)
class WeightStorage:
    """How weights that bfloat16 holds are kept; of how many matrices how many are compressed."""

    kind: StorageKind
    num_matrices: int = 0
    num_compressed: int = 0


_storage: ContextVar[WeightStorage | None] = ContextVar("weight_storage", default=None)


@contextmanager
def weight_storage(kind: StorageKind) -> Iterator[WeightStorage]:
    """Within it, how every new `FixedOrderLinear` keeps its weights.

    int8 quantizes bfloat16 weights. compressed keeps what bfloat16 holds in twelve bits a weight,
    without loss, where that is smaller.
    """
    storage = WeightStorage(kind)
    token = _storage.set(storage)
    try:
        yield storage
    finally:
        _storage.reset(token)


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
    the product in float32. Within `weight_storage`, either may be compressed, with the same bits of
    the product, or bfloat16 weights are quantized further, and so is x in the product
    (`reference.quantized_linear`). No gradients.
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

    int8 holds quantized weights with their scales; uint8 compressed bfloat16 weights, and int32
    compressed ones of float32. Widening takes as long as multiplying where vectors are short, so
    there float32 is kept.
    """
    storage = _storage.get()
    if storage is not None:
        storage.num_matrices += 1
    if weight.dtype == torch.bfloat16:
        if storage is not None and storage.kind == "int8":
            quantized: Tensor = torch.ops.cottention.quantize_weight(weight.float())
            return quantized
        return _smaller(_pack_weight(weight), torch.uint8)
    can_widen = weight.shape[1] % 2 == 0 and has_wide_vectors()
    if can_widen and _is_bfloat16(weight):
        packed = _smaller(_pack_weight(weight.to(torch.bfloat16)), torch.int32)
        return packed.view(torch.int16) if packed.dtype == torch.bfloat16 else packed
    return _pack_weight(weight)


def _smaller(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Packed bfloat16 weights, or the bytes of their compressed form as `dtype`."""
    storage = _storage.get()
    if storage is None or storage.kind != "compressed":
        return packed
    compressed: Tensor = torch.ops.cottention.compress_weight(packed)
    if compressed.nbytes > MAX_COMPRESSED * packed.nbytes:
        return packed
    storage.num_compressed += 1
    return compressed.view(dtype)


def has_wide_vectors() -> bool:
    """Whether the CPU has AVX2 or as much."""
    return torch.backends.cpu.get_cpu_capability() != "DEFAULT"


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

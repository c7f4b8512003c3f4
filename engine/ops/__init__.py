"""The ops of the engine: compiled where that is possible, plain torch where it is not.

Owns the dispatch. Tensors that are float32 and on the CPU go to the compiled ops (one arithmetic:
a row's bits depend on nothing but the row), and to the recurrence those of 16 bits as well; on CUDA
the recurrence goes to its kernel, long segments to products; other types and tensors that need
gradients go to the reference. Widths that the kernel does not take are announced once. Knows no
model, no session and no position in a conversation.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from cottention.engine.ops import checks, loader, reference, varlen
from cottention.engine.ops.build import BuildError
from cottention.engine.ops.checks import kernel_has_width
from cottention.engine.ops.fused import can_draw, can_mix, cottention_layers, cottention_mix, draw
from cottention.engine.ops.linear import FixedOrderLinear, FixedOrderNorm, can_pack
from cottention.engine.ops.loader import Backend, announce_reference, backend
from cottention.engine.ops.reference import NO_PLACE, PADDING_SLOT, rotate
from cottention.engine.ops.varlen import Segments, check_slots

__all__ = [
    "NO_PLACE",
    "PADDING_SLOT",
    "Backend",
    "BuildError",
    "FixedOrderLinear",
    "FixedOrderNorm",
    "Segments",
    "backend",
    "can_draw",
    "can_mix",
    "can_pack",
    "check_slots",
    "cottention_features",
    "cottention_layers",
    "cottention_mix",
    "draw",
    "elu_plus_one",
    "gelu_new",
    "kernel_has_width",
    "likeliest",
    "max_stepped",
    "recurrent_segments",
    "recurrent_step",
    "rotary_table",
    "rotate",
]

MAX_STEPPED = 32
"""Longest segment that the CUDA kernel reads token by token; products have the longer ones."""


def recurrent_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    z: Tensor | None,
    slots: Tensor,
    offsets: Tensor | None = None,
) -> Tensor:
    """Advance the named rows of the pool in place, in token order, and read each token's output.

    q, k [N, H, K]; v [N, H, V], all of one type; state [S, H, V, K] and z [S, H, K] or None, moved
    in place, float32 (float64 where q is), which is what products and sums are taken in; slots
    int32 [B], −1 is padding and yields zeros; offsets int32 [B + 1] gives segment i the tokens
    offsets[i]:offsets[i + 1], None means one token per slot. Returns [N, H, V] in the type of v.
    Raises ValueError or RuntimeError before any memory is touched. On CUDA slots and offsets are
    not looked at before: rows that are out of range are skipped; `Segments.of` checks them.
    """
    is_compiled = _compiled_takes(q, k, v, types=checks.HALF_OR_SINGLE) or _on_cuda_with_ops(q)
    if is_compiled and _kernel_takes(q.shape[-1], v.shape[-1]):
        checks.check_one_device(q, k, v, state, z, slots, offsets)
        out: Tensor = torch.ops.cottention.recurrent_step(q, k, v, state, z, slots, offsets)
        return out
    checks.check_step(q, k, v, state, z, slots, offsets)
    return reference.recurrent_step(q, k, v, state, z, slots, offsets)


def recurrent_segments(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, z: Tensor | None, segments: Segments
) -> Tensor:
    """`recurrent_step` on segments that were worked out ahead: on CUDA it waits for nothing."""
    if q.device.type == "cpu":
        return recurrent_step(q, k, v, state, z, segments.slots, segments.offsets)
    checks.check_one_device(q, k, v, state, z, segments.slots, segments.offsets)
    if _on_cuda_with_ops(q) and _kernel_takes(q.shape[-1], v.shape[-1]):
        return varlen.advance_by_kernel(q, k, v, state, z, segments)
    return varlen.advance_by_torch(q, k, v, state, z, segments)


def max_stepped(device: str, key: int, value: int) -> int | None:
    """Longest segment to be moved token by token where keys and values are so wide; None: any."""
    if device == "cpu":
        return None
    return MAX_STEPPED if loader.is_cuda_ready() and kernel_has_width(key, value) else 0


def rotary_table(
    positions: Tensor, rotary_dim: int, base: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, rotary_dim / 2] of position · base^(−2i / rotary_dim).

    positions int64 [N], counted from 0. The angles are taken in float64 whatever the `dtype`.
    """
    if positions.device.type == "cpu" and dtype == torch.float32 and backend() == "compiled":
        cos, sin = torch.ops.cottention.rotary_table(positions, rotary_dim, base)
        return cos, sin
    cos, sin = reference.rotary_table(positions, rotary_dim, base)
    return cos.to(dtype), sin.to(dtype)


def cottention_features(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, sigma: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated and normalised q and k, and v / (position + 1)^sigma.

    q, k, v [N, H, D] (the reference also takes leading dimensions); positions int64 [N], from 0;
    sigma float64 [H]; cos, sin [N, rotary_dim / 2] (float32 spares a cast). Returns q's shape.
    """
    if q.dim() == 3 and _compiled_takes(q, k, v, sigma):
        checks.check_one_device(q, k, v, positions, sigma, cos, sin)
        angles = cos.float(), sin.float()
        q, k, v = torch.ops.cottention.cottention_features(q, k, v, positions, sigma, *angles)
        return q, k, v
    return reference.cottention_features(q, k, v, positions, sigma, cos, sin)


def likeliest(logits: Tensor) -> Tensor:
    """The first place of each row's largest logit, −1 where that is not finite: int64 [R].

    logits [R, N]. A row with anything that is not a number has no likeliest place.
    """
    if _compiled_takes(logits):
        out: Tensor = torch.ops.cottention.likeliest(logits)
        return out
    return reference.likeliest(logits)


def gelu_new(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), elementwise; x [N, C] for the compiled form."""
    if x.dim() == 2 and _compiled_takes(x):
        out: Tensor = torch.ops.cottention.gelu_new(x)
        return out
    return reference.gelu_new(x)


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, elementwise: x + 1 from 0 on, exp(x) below. x [N, H, D] for the compiled form."""
    if x.dim() == 3 and _compiled_takes(x):
        out: Tensor = torch.ops.cottention.elu_plus_one(x.flatten(1))
        return out.view(x.shape)
    return reference.elu_plus_one(x)


def _compiled_takes(
    x: Tensor, *others: Tensor, types: Collection[torch.dtype] = (torch.float32,)
) -> bool:
    """x decides on type and device; a mismatch between arguments is the op's to refuse."""
    if x.device.type != "cpu" or x.dtype not in types:
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *others)):
        return False
    return backend() == "compiled"


def _on_cuda_with_ops(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype in checks.HALF_OR_SINGLE and loader.is_cuda_ready()


def _kernel_takes(key: int, value: int) -> bool:
    if kernel_has_width(key, value):
        return True
    announce_reference(f"no kernel for key width {key} and value width {value}")
    return False

"""What the ops ask of their tensors where the compiled op does not ask itself.

Owns the widths that the kernels take, and the refusal, before memory is touched, of arguments on
several devices, and for the reference step of wrong types, shapes, offsets and slots, in the words
of the compiled one.
"""

import torch
from torch import Tensor

from cottention.engine.ops.reference import PADDING_SLOT

MAX_KEY_WIDTH = 512
MAX_VALUE_WIDTH = 256

HALF_OR_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
"""Types of queries, keys and values that the compiled step takes; the state is float32."""


def kernel_has_width(key: int, value: int) -> bool:
    """Whether the compiled step takes keys and values of these widths."""
    fits = 8 <= key <= MAX_KEY_WIDTH and 8 <= value <= MAX_VALUE_WIDTH
    return fits and key % 8 == 0 and value % 8 == 0


def check_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    z: Tensor | None,
    slots: Tensor,
    offsets: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments of `recurrent_step` fit together."""
    check_one_device(q, k, v, state, z)
    _check_dims(q, "q", 3)
    _check_dims(state, "state", 4)
    num_tokens, heads, key = q.shape
    value = v.shape[-1]
    _check_shape(k, "k", (num_tokens, heads, key))
    _check_shape(v, "v", (num_tokens, heads, value))
    _check_shape(state, "state", (state.shape[0], heads, value, key))
    if z is not None:
        _check_shape(z, "z", (state.shape[0], heads, key))
    _check_types(q, k, v, state, z)
    for name, pool in (("state", state), ("z", z)):
        if pool is not None:
            _check_rows_apart(pool, name)
    _check_slots(slots, state.shape[0])
    _check_offsets(offsets, len(slots), num_tokens)


def check_one_device(*tensors: Tensor | None) -> None:
    """Raise ValueError unless all lie on one device: torch would choose the op by any of them."""
    devices = {x.device for x in tensors if x is not None}
    if len(devices) > 1:
        raise ValueError(f"tensors must lie on one device, not on {sorted(map(str, devices))}")


def _check_dims(x: Tensor, name: str, dims: int) -> None:
    if x.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, not {x.dim()}")


def _check_shape(x: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, not {list(x.shape)}")


def _check_types(q: Tensor, k: Tensor, v: Tensor, state: Tensor, z: Tensor | None) -> None:
    if not q.is_floating_point():
        raise ValueError(f"q must be a floating-point tensor, not {q.dtype}")
    wide = torch.promote_types(q.dtype, torch.float32)
    pairs = (("k", k, q.dtype), ("v", v, q.dtype), ("state", state, wide), ("z", z, wide))
    for name, x, expected in pairs:
        if x is not None and x.dtype != expected:
            raise ValueError(f"{name} has the wrong dtype: {x.dtype} where q's asks for {expected}")


def _check_rows_apart(pool: Tensor, name: str) -> None:
    if any(n > 1 and stride == 0 for n, stride in zip(pool.shape, pool.stride(), strict=True)):
        raise ValueError(f"{name} has rows that overlap")


def _check_slots(slots: Tensor, pool_size: int) -> None:
    if slots.dtype != torch.int32 or slots.dim() != 1:
        raise ValueError("slots must be int32 with 1 dimension")
    named = [slot for slot in slots.tolist() if slot != PADDING_SLOT]
    for slot in named:
        if not 0 <= slot < pool_size:
            raise ValueError(f"slot {slot} is out of range for a pool of {pool_size}")
    if len(set(named)) != len(named):
        raise ValueError("a slot is named twice")


def _check_offsets(offsets: Tensor | None, num_segments: int, num_tokens: int) -> None:
    if offsets is None:
        if num_segments != num_tokens:
            raise ValueError(
                "without offsets there must be one slot per token:"
                f" {num_segments} slots, {num_tokens} tokens"
            )
        return
    if offsets.dtype != torch.int32 or offsets.shape != (num_segments + 1,):
        raise ValueError(f"offsets must be int32 with {num_segments + 1} elements")
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != num_tokens or bounds != sorted(bounds):
        raise ValueError(f"offsets must rise from 0 to {num_tokens}")

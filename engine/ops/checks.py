"""What the ops ask of their tensors where the compiled op does not ask itself.

Owns the widths that the kernels take, and the refusal, before memory is touched, of arguments on
several devices, and for the reference step of wrong types, shapes, offsets and slots, in the words
of the compiled one.
"""

import torch
from torch import Tensor

from engine.ops.reference import PADDING_SLOT

MAX_KEY_WIDTH = 512
MAX_VALUE_WIDTH = 256


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
    num_tokens, heads, key = q.shape
    value = v.shape[-1]
    _check_shape(k, "k", (num_tokens, heads, key))
    _check_shape(v, "v", (num_tokens, heads, value))
    _check_shape(state, "state", (state.shape[0], heads, value, key))
    if z is not None:
        _check_shape(z, "z", (state.shape[0], heads, key))
    for name, x in (("k", k), ("v", v), ("state", state), ("z", z)):
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor")
    _check_slots(slots, state.shape[0])
    _check_offsets(offsets, len(slots), num_tokens)


def check_one_device(*tensors: Tensor | None) -> None:
    """Raise ValueError unless all lie on one device: torch would choose the op by any of them."""
    devices = {x.device for x in tensors if x is not None}
    if len(devices) > 1:
        raise ValueError(f"tensors must lie on one device, not on {sorted(map(str, devices))}")


def _check_shape(x: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, not {list(x.shape)}")


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

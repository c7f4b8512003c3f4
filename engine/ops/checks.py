"""Argument checks that the compiled ops cannot make themselves, and those of the reference step.

The widths that the kernels support; tensors on several devices; and for `recurrent_step` by the
reference the same conditions as in the compiled op: types, shapes, cu_seqlens and state_indices.
"""

import torch
from torch import Tensor

from cottention.engine.ops.reference import PADDING_SLOT

MAX_KEY_WIDTH = 512
MAX_FUSED_WIDTH = 256

HALF_OR_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
"""Types of q, k and v that the compiled step supports; the state is float32."""


def kernel_has_width(key: int, value: int) -> bool:
    """Whether the step's kernels support these widths: multiples of 8, keys of at most 512."""
    return 8 <= key <= MAX_KEY_WIDTH and value >= 8 and key % 8 == 0 and value % 8 == 0


def fused_kernel_has_width(width: int) -> bool:
    """Whether `cottention_attention_gelu` supports this head width: multiples of 8 up to 256."""
    return width <= MAX_FUSED_WIDTH and kernel_has_width(width, width)


def check_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    z: Tensor | None,
    state_indices: Tensor,
    cu_seqlens: Tensor | None,
    w: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments of `recurrent_step` fit together."""
    check_one_device(q, k, v, state, z, w, a, b)
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
    _check_terms(w, a, b, q, state, has_z=z is not None)
    for name, pool in (("state", state), ("z", z)):
        if pool is not None:
            _check_no_overlap(pool, name)
    _check_state_indices(state_indices, state.shape[0])
    _check_cu_seqlens(cu_seqlens, len(state_indices), num_tokens)


def check_one_device(*tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on one device: torch dispatches by any of them."""
    for x in tensors:  # all on the CPU: found in half the time that a list of devices takes
        if x is not None and not x.is_cpu:
            break
    else:
        return
    devices = [x.device for x in tensors if x is not None]
    if devices.count(devices[0]) < len(devices):
        names = sorted(set(map(str, devices)))
        raise ValueError(f"tensors must be on one device, not on {names}")


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
            raise ValueError(f"{name} has the wrong dtype: {x.dtype} where q requires {expected}")


def _check_terms(
    w: Tensor | None, a: Tensor | None, b: Tensor | None, q: Tensor, state: Tensor, *, has_z: bool
) -> None:
    if (a is None) != (b is None):
        raise ValueError("a and b must be given together")
    if a is not None and has_z:
        raise ValueError("a and b are not supported with z, a denominator")
    if w is not None and w.dim() != 2:
        _check_shape(w, "w", tuple(q.shape))
    elif w is not None:
        _check_shape(w, "w", tuple(q.shape[:2]))
    for name, x in (("a", a), ("b", b)):
        if x is not None:
            _check_shape(x, name, tuple(q.shape))
    for name, x in (("w", w), ("a", a), ("b", b)):
        if x is not None and x.dtype != state.dtype:
            raise ValueError(
                f"{name} has the wrong dtype: {x.dtype} where the state is {state.dtype}"
            )


def _check_no_overlap(pool: Tensor, name: str) -> None:
    if any(n > 1 and stride == 0 for n, stride in zip(pool.shape, pool.stride(), strict=True)):
        raise ValueError(f"{name} has rows that overlap")


def _check_state_indices(state_indices: Tensor, pool_size: int) -> None:
    if state_indices.dtype != torch.int32 or state_indices.dim() != 1:
        raise ValueError("state_indices must be int32 with 1 dimension")
    used = [slot for slot in state_indices.tolist() if slot != PADDING_SLOT]
    for slot in used:
        if not 0 <= slot < pool_size:
            raise ValueError(f"slot {slot} is out of range for a pool of {pool_size}")
    if len(set(used)) != len(used):
        raise ValueError("a slot is named twice")


def _check_cu_seqlens(cu_seqlens: Tensor | None, num_segments: int, num_tokens: int) -> None:
    if cu_seqlens is None:
        if num_segments != num_tokens:
            raise ValueError(
                "without cu_seqlens there must be one state index per token:"
                f" {num_segments} state_indices, {num_tokens} tokens"
            )
        return
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.shape != (num_segments + 1,):
        raise ValueError(f"cu_seqlens must be int32 with {num_segments + 1} elements")
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != num_tokens or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to {num_tokens}")

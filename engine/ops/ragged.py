"""The recurrence over segments of any lengths on a GPU: a kernel for short ones, products for long.

Owns the torch forms, which never wait for the device: one token for many rows, and chunks of many
segments at once. Agrees with `reference.recurrent_step` to rounding, on any device and in any
float type.

Letters: those of `segments.py`, and H heads, K key width, V value width, S slots.
"""

import torch
from cottention.engine.ops import reference
from cottention.engine.ops.chunked import read_chunks
from cottention.engine.ops.reference import DENOMINATOR_FLOOR
from cottention.engine.ops.segments import Chunks, Segments
from torch import Tensor


def advance_by_kernel(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, z: Tensor | None, segments: Segments
) -> Tensor:
    """Move the rows of all segments: the compiled op for short ones, products for long ones.

    q, k [N, H, K]; v [N, H, V]; state [S, H, V, K] and z [S, H, K] or None are changed in place.
    Returns [N, H, V].
    """
    step = torch.ops.cottention.recurrent_step
    out: Tensor = step(q, k, v, state, z, segments.slots, segments.offsets)
    return _with_chunks(out, q, k, v, state, z, segments.chunks)


def advance_by_torch(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, z: Tensor | None, segments: Segments
) -> Tensor:
    """The same without compiled ops. Only segments that are neither single nor cut cost a wait."""
    if segments.offsets is None:
        return advance_rows(q, k, v, state, z, segments.slots)
    out = torch.zeros_like(v)
    if segments.has_steps:
        out = reference.recurrent_step(q, k, v, state, z, segments.slots, segments.offsets)
    return _with_chunks(out, q, k, v, state, z, segments.chunks)


def advance_rows(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, z: Tensor | None, slots: Tensor
) -> Tensor:
    """One token for each of slots int32 [N]; those outside the pool yield zeros, move nothing."""
    is_out = (slots < 0) | (slots >= len(state))
    rows = slots.long().masked_fill(is_out, 0)
    nothing = is_out[:, None, None]
    given = v.dtype
    q, k, v = (x.to(state.dtype).masked_fill(nothing, 0) for x in (q, k, v))
    state.index_add_(0, rows, v.unsqueeze(-1) * k.unsqueeze(-2))
    out = (state[rows] @ q.unsqueeze(-1)).squeeze(-1)
    if z is not None:
        z.index_add_(0, rows, k)
        total = (z[rows] * q).sum(-1, keepdim=True)
        out = out / total.clamp_min(DENOMINATOR_FLOOR)
    return out.masked_fill(nothing, 0).to(given)


def advance_chunks(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, z: Tensor | None, chunks: Chunks
) -> Tensor:
    """Move the rows of long segments by products of matrices; outputs [M, H, T, V] of all chunks,
    in the state's type.

    What a chunk finds is its row's state and the updates of the segment's chunks before it: one
    product with a triangle of ones, whatever the lengths.
    """
    q, k, v = (_cut(x, chunks).to(state.dtype) for x in (q, k, v))
    borders = _accumulate(state, v.transpose(-1, -2) @ k, chunks)
    z_borders = None if z is None else _accumulate(z, k.sum(-2), chunks)
    return read_chunks(q, k, v, borders, z_borders)


def _cut(x: Tensor, chunks: Chunks) -> Tensor:
    """[N, H, D] → [M, H, T, D], zeros where a chunk has no token: they add nothing."""
    cut: Tensor = x[chunks.tokens].masked_fill(~chunks.is_token[..., None, None], 0)
    return cut.transpose(1, 2)


def _accumulate(pool: Tensor, updates: Tensor, chunks: Chunks) -> Tensor:
    """Add updates [M, …] to the rows of their segments; gives what stood before each chunk."""
    initial = pool[chunks.slots]
    flat = updates.flatten(1)
    pool[chunks.slots] = initial + (chunks.members.to(pool.dtype) @ flat).view_as(initial)
    before = (chunks.earlier.to(pool.dtype) @ flat).view_as(updates)
    return initial[chunks.owner] + before


def _with_chunks(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    z: Tensor | None,
    chunks: Chunks | None,
) -> Tensor:
    """Put the outputs of long segments, where there are any, into out [N, H, V]."""
    if chunks is None:
        return out
    read = advance_chunks(q, k, v, state, z, chunks).transpose(1, 2).flatten(0, 1)
    return out.index_copy_(0, chunks.targets, read[chunks.sources].to(out.dtype))

"""Which rows of a pool a batch moves, and by which tokens: worked out on the host, once per step.

Owns the check of slots where they are still Python's own numbers (on a GPU, looking would mean
waiting), and how long segments are cut into chunks. Knows no model, and does not know what
computes on the segments.

Letters: B segments, N tokens, M chunks of T tokens, G segments that are cut into chunks.

The parallel form from an initial state: matrix products per chunk, one state per chunk border.

Owns the form that training differentiates through and that prefill on CUDA is made of. Agrees with
`reference.recurrent_step` to rounding; it sums in another order, so never to the bit.

The recurrence over segments of any lengths on a GPU: a kernel for short ones, products for long.

Owns the torch forms, which never wait for the device: one token for many rows, and chunks of many
segments at once. Agrees with `reference.recurrent_step` to rounding, on any device and in any
float type.

Letters: those of `segments.py`, and H heads, K key width, V value width, S slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Self

import torch
from torch import Tensor

from cottention.engine.ops import reference
from cottention.engine.ops.reference import DENOMINATOR_FLOOR, PADDING_SLOT

CHUNK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Chunks:
    """Long segments of a batch, cut into pieces of one length.

    tokens: int64 [M, T], places in the batch, 0 behind a segment's end; is_token: bool [M, T].
    sources, targets: int64 [n], places in the flattened chunks and in the batch of all their
    tokens. slots: int64 [G]. owner: int64 [M], the segment of each chunk.
    earlier: float32 [M, M], 1 where a chunk stands before another of its segment;
    members: float32 [G, M], 1 where a chunk is of a segment.
    """

    tokens: Tensor
    is_token: Tensor
    sources: Tensor
    targets: Tensor
    slots: Tensor
    owner: Tensor
    earlier: Tensor
    members: Tensor

    @classmethod
    def of(cls, segments: Sequence[tuple[int, range]], device: str) -> Self:
        """From (slot, places of its tokens in the batch) of each segment; none is empty."""
        pieces = [
            (index, places[start : start + CHUNK_TOKENS])
            for index, (_, places) in enumerate(segments)
            for start in range(0, len(places), CHUNK_TOKENS)
        ]
        tokens = torch.zeros(len(pieces), CHUNK_TOKENS, dtype=torch.int64)
        is_token = torch.zeros(len(pieces), CHUNK_TOKENS, dtype=torch.bool)
        for row, (_, places) in enumerate(pieces):
            tokens[row, : len(places)] = torch.tensor(places)
            is_token[row, : len(places)] = True
        owner = torch.tensor([index for index, _ in pieces])
        members = owner == torch.arange(len(segments)).unsqueeze(-1)
        return cls(
            tokens=tokens.to(device),
            is_token=is_token.to(device),
            sources=is_token.flatten().nonzero().squeeze(-1).to(device),
            targets=tokens[is_token].to(device),
            slots=torch.tensor([slot for slot, _ in segments]).to(device),
            owner=owner.to(device),
            earlier=(owner == owner.unsqueeze(-1)).float().tril(-1).to(device),
            members=members.float().to(device),
        )


@dataclass(frozen=True, slots=True)
class Segments:
    """Rows of a pool and the tokens that move them.

    slots: int32 [B]; −1 is padding, or a segment that is cut. offsets: int32 [B + 1]: segment i has
    the tokens offsets[i]:offsets[i + 1]; None: one token each. chunks: the segments that are cut,
    if any; has_steps: whether slots names any row.
    """

    slots: Tensor
    offsets: Tensor | None = None
    chunks: Chunks | None = None
    has_steps: bool = True

    @classmethod
    def of(
        cls,
        slots: Sequence[int],
        lengths: Sequence[int],
        num_slots: int,
        device: str,
        *,
        max_stepped: int | None = None,
    ) -> Self:
        """Consecutive segments of these lengths on a pool of `num_slots` rows.

        Those of more than `max_stepped` tokens are cut into chunks, unless all have one; None: none
        is. Raises ValueError for a slot that is out of range or named twice.
        """
        check_slots(slots, num_slots)
        if all(length == 1 for length in lengths):
            return cls(_int32(slots, device))
        ends = list(accumulate(lengths, initial=0))
        places = [range(start, stop) for start, stop in pairwise(ends)]
        limit = ends[-1] if max_stepped is None else max_stepped
        long = [(s, p) for s, p in zip(slots, places, strict=True) if _is_cut(s, p, limit)]
        taken = {slot for slot, _ in long}
        stepped = [PADDING_SLOT if slot in taken else slot for slot in slots]
        return cls(
            slots=_int32(stepped, device),
            offsets=_int32(ends, device),
            chunks=Chunks.of(long, device) if long else None,
            has_steps=any(slot != PADDING_SLOT for slot in stepped),
        )


def check_slots(slots: Sequence[int], num_slots: int) -> None:
    """Raise ValueError for a slot that is out of range or named twice; −1 may be both."""
    named = [slot for slot in slots if slot != PADDING_SLOT]
    for slot in named:
        if not 0 <= slot < num_slots:
            raise ValueError(f"slot {slot} is out of range for a pool of {num_slots}")
    if len(set(named)) != len(named):
        raise ValueError("a slot is named twice")


def _is_cut(slot: int, places: range, limit: int) -> bool:
    return len(places) > limit and slot != PADDING_SLOT


def _int32(values: Sequence[int], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    z: Tensor | None = None,
    *,
    chunk_size: int = 128,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run T tokens of B sequences from `state`, `chunk_size` tokens at a time.

    q, k [B, H, T, K]; v [B, H, T, V]; state [B, H, V, K]; z [B, H, K] or None. Returns the outputs
    [B, H, T, V], the state and the denominator after the last token. Nothing is changed in place.
    """
    length = q.shape[-2]
    qs, ks, vs = (_split(x, chunk_size) for x in (q, k, v))
    borders, state = _running(vs.transpose(-1, -2) @ ks, state)
    z_borders = None
    if z is not None:
        z_borders, z = _running(ks.sum(-2), z)
    out = read_chunks(qs, ks, vs, borders, z_borders)
    return out.flatten(2, 3)[:, :, :length], state, z


def read_chunks(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, z_borders: Tensor | None
) -> Tensor:
    """Outputs [..., T, V] of chunks, each from the state that stood before it.

    q, k [..., T, K]; v [..., T, V]; borders [..., V, K]; z_borders [..., K] or None.
    """
    scores = (q @ k.transpose(-1, -2)).tril()
    out = scores @ v + q @ borders.to(q.dtype).transpose(-1, -2)
    if z_borders is None:
        return out
    total = scores.sum(-1, keepdim=True) + q @ z_borders.to(q.dtype).unsqueeze(-1)
    return out / total.clamp_min(DENOMINATOR_FLOOR)


def _split(x: Tensor, chunk_size: int) -> Tensor:
    """[B, H, T, D] → [B, H, chunks, chunk_size, D], zeros behind the end: they add nothing."""
    padding = -x.shape[-2] % chunk_size
    x = torch.nn.functional.pad(x, (0, 0, 0, padding))
    split: Tensor = x.unflatten(-2, (-1, chunk_size))
    return split


def _running(updates: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """Updates [B, H, chunks, …] → what stood before each chunk, and what stands after the last."""
    steps = torch.cat([initial.unsqueeze(2), updates.to(initial.dtype)], dim=2).cumsum(dim=2)
    return steps[:, :, :-1], steps[:, :, -1]


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

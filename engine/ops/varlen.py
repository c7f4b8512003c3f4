"""The recurrence over segments of different lengths: how a batch is cut, and its computation.

`Segments` is prepared on the host, once per step. A GPU is slow at many dependent steps. Its kernel
takes long segments in pieces that are stepped side by side (csrc/cuda/recurrent.cuh); torch alone
computes segments as matrix products over chunks of tokens. `chunked` is the same chunked form for
sequences of one length; training differentiates through it. Both equal `reference.recurrent_step`
to rounding, in any floating-point type and on any device, and nothing here waits for the device
unless noted.

Letters: B segments or sequences, N tokens, P pieces, M chunks of T tokens, G segments that are cut
into chunks, H heads, K key width, V value width, S slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from cottention.engine.ops import reference
from cottention.engine.ops.reference import DENOMINATOR_FLOOR, PADDING_SLOT

CHUNK_TOKENS = 64

PIECE_TOKENS = 64
"""Longest run of tokens that the CUDA kernel steps one after the other."""

SegmentForm = Literal["whole", "pieces", "chunks"]
"""What the recurrence of a device takes: segments of any length, or cut into either."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """Long segments of a batch, cut into chunks of one length.

    tokens: int64 [M, T], token indices in the batch, 0 behind the end of a segment; is_token: bool
    [M, T]. sources, targets: int64 [n], indices of the tokens in the flattened chunks and in the
    batch. state_indices: int64 [G]. owner: int64 [M], the segment of each chunk. earlier: float32
    [M, M], 1 where a chunk precedes another of its segment; members: float32 [G, M], 1 where a
    chunk belongs to a segment.
    """

    tokens: Tensor
    is_token: Tensor
    sources: Tensor
    targets: Tensor
    state_indices: Tensor
    owner: Tensor
    earlier: Tensor
    members: Tensor

    @classmethod
    def of(cls, segments: Sequence[tuple[int, range]], device: str) -> Self:
        """From (slot, token indices in the batch) of each segment; no segment is empty."""
        pieces = [
            (index, span[start : start + CHUNK_TOKENS])
            for index, (_, span) in enumerate(segments)
            for start in range(0, len(span), CHUNK_TOKENS)
        ]
        tokens = torch.zeros(len(pieces), CHUNK_TOKENS, dtype=torch.int64)
        is_token = torch.zeros(len(pieces), CHUNK_TOKENS, dtype=torch.bool)
        for row, (_, span) in enumerate(pieces):
            tokens[row, : len(span)] = torch.tensor(span)
            is_token[row, : len(span)] = True
        owner = torch.tensor([index for index, _ in pieces])
        members = owner == torch.arange(len(segments)).unsqueeze(-1)
        return cls(
            tokens=tokens.to(device),
            is_token=is_token.to(device),
            sources=is_token.flatten().nonzero().squeeze(-1).to(device),
            targets=tokens[is_token].to(device),
            state_indices=torch.tensor([slot for slot, _ in segments]).to(device),
            owner=owner.to(device),
            earlier=(owner == owner.unsqueeze(-1)).float().tril(-1).to(device),
            members=members.float().to(device),
        )


class Piece(NamedTuple):
    """Tokens begin:end of a segment, and its first and last piece; as in csrc/cuda/params.h."""

    slot: int
    begin: int
    end: int
    first_piece: int
    last_piece: int


def pieces_of(
    state_indices: Sequence[int], ends: Sequence[int], piece_tokens: int
) -> tuple[list[Piece], int]:
    """All pieces of segments, and how many of them are of segments that are cut: the first ones.

    Segment i has the tokens ends[i]:ends[i + 1]. Those of more than `piece_tokens` tokens are cut,
    unless they are padding.
    """
    cut: list[Piece] = []
    whole: list[tuple[int, int, int]] = []
    for slot, (start, stop) in zip(state_indices, pairwise(ends), strict=True):
        if stop - start <= piece_tokens or slot == PADDING_SLOT:
            whole.append((slot, start, stop))
            continue
        begins = range(start, stop, piece_tokens)
        first, last = len(cut), len(cut) + len(begins) - 1
        cut += [Piece(slot, i, min(i + piece_tokens, stop), first, last) for i in begins]
    num_cut = len(cut)
    places = range(num_cut, num_cut + len(whole))
    pieces = [Piece(*each, i, i) for i, each in zip(places, whole, strict=True)]
    return cut + pieces, num_cut


@dataclass(frozen=True, slots=True)
class Segments:
    """Consecutive segments of a batch's tokens, and the row of the pool that each one updates.

    state_indices: int32 [B]; −1 is padding. cu_seqlens: int32 [B + 1]: segment i has the tokens
    cu_seqlens[i]:cu_seqlens[i + 1]; None: one token each. chunks, or pieces int32 [P, 5] of which
    the first num_cut are of segments that are cut: the same segments as a device takes them that
    does not take them whole; None where all have one token.
    """

    state_indices: Tensor
    cu_seqlens: Tensor | None = None
    chunks: Chunks | None = None
    pieces: Tensor | None = None
    num_cut: int = 0

    @classmethod
    def of(
        cls,
        state_indices: Sequence[int],
        lengths: Sequence[int],
        num_slots: int,
        device: str,
        *,
        form: SegmentForm = "whole",
        piece_tokens: int = PIECE_TOKENS,
    ) -> Self:
        """Segments of these lengths on a pool of `num_slots` rows; −1 is padding.

        piece_tokens: of the longest piece. Raises ValueError for a slot that is out of range or
        used twice.
        """
        check_state_indices(state_indices, num_slots)
        if all(length == 1 for length in lengths):
            return cls(_int32(state_indices, device))
        ends = list(accumulate(lengths, initial=0))
        whole = _int32(state_indices, device), _int32(ends, device)
        if form == "pieces":
            pieces, num_cut = pieces_of(state_indices, ends, piece_tokens)
            table = torch.tensor(pieces, dtype=torch.int32, device=device).view(
                -1, len(Piece._fields)
            )
            return cls(*whole, pieces=table, num_cut=num_cut)
        if form == "chunks":
            spans = [range(start, stop) for start, stop in pairwise(ends)]
            named = zip(state_indices, spans, strict=True)
            cut = [(slot, span) for slot, span in named if span and slot != PADDING_SLOT]
            return cls(*whole, chunks=Chunks.of(cut, device) if cut else None)
        return cls(*whole)


def check_state_indices(state_indices: Sequence[int], num_slots: int) -> None:
    """Raise ValueError for a slot that is out of range or used twice; −1 is padding."""
    used = [slot for slot in state_indices if slot != PADDING_SLOT]
    for slot in used:
        if not 0 <= slot < num_slots:
            raise ValueError(f"slot {slot} is out of range for a pool of {num_slots}")
    if len(set(used)) != len(used):
        raise ValueError("a slot is named twice")


def _int32(values: Sequence[int], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def advance_by_torch(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, z: Tensor | None, segments: Segments
) -> Tensor:
    """All segments, without compiled ops.

    q, k [N, H, K]; v [N, H, V]; state [S, H, V, K] and z [S, H, K] or None are updated in place.
    Returns [N, H, V]. Waits for the device if there are segments of several tokens that are not cut
    into chunks.
    """
    if segments.cu_seqlens is None:
        return advance_rows(q, k, v, state, z, segments.state_indices)
    chunks = segments.chunks
    if chunks is None:
        return reference.recurrent_step(
            q, k, v, state, z, segments.state_indices, segments.cu_seqlens
        )
    outputs = advance_chunks(q, k, v, state, z, chunks).transpose(1, 2).flatten(0, 1)
    return torch.zeros_like(v).index_copy_(0, chunks.targets, outputs[chunks.sources].to(v.dtype))


def advance_rows(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, z: Tensor | None, state_indices: Tensor
) -> Tensor:
    """One token for each of state_indices int32 [N]; indices outside the pool give zeros."""
    is_outside = (state_indices < 0) | (state_indices >= len(state))
    rows = state_indices.long().masked_fill(is_outside, 0)
    mask = is_outside[:, None, None]
    dtype = v.dtype
    q, k, v = (x.to(state.dtype).masked_fill(mask, 0) for x in (q, k, v))
    state.index_add_(0, rows, v.unsqueeze(-1) * k.unsqueeze(-2))
    out = (state[rows] @ q.unsqueeze(-1)).squeeze(-1)
    if z is not None:
        z.index_add_(0, rows, k)
        total = (z[rows] * q).sum(-1, keepdim=True)
        out = out / total.clamp_min(DENOMINATOR_FLOOR)
    return out.masked_fill(mask, 0).to(dtype)


def advance_chunks(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, z: Tensor | None, chunks: Chunks
) -> Tensor:
    """Update the rows of long segments by matrix products; outputs [M, H, T, V] of all chunks.

    The state before a chunk is that of its row plus the updates of the earlier chunks of its
    segment: one product with a triangle of ones, whatever the lengths. Outputs have the type of the
    state.
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
    """Add updates [M, …] to the rows of their segments; returns the values before each chunk."""
    initial = pool[chunks.state_indices]
    flat = updates.flatten(1)
    pool[chunks.state_indices] = initial + (chunks.members.to(pool.dtype) @ flat).view_as(initial)
    before = (chunks.earlier.to(pool.dtype) @ flat).view_as(updates)
    return initial[chunks.owner] + before


def read_chunks(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, z_borders: Tensor | None
) -> Tensor:
    """Outputs [..., T, V] of chunks, each from the state before it: out = tril(q kᵀ) v + q Sᵀ.

    q, k [..., T, K]; v [..., T, V]; borders [..., V, K] are the states S; z_borders [..., K] or
    None the denominators before each chunk.
    """
    scores = (q @ k.transpose(-1, -2)).tril()
    out = scores @ v + q @ borders.to(q.dtype).transpose(-1, -2)
    if z_borders is None:
        return out
    total = scores.sum(-1, keepdim=True) + q @ z_borders.to(q.dtype).unsqueeze(-1)
    return out / total.clamp_min(DENOMINATOR_FLOOR)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    z: Tensor | None = None,
    *,
    chunk_size: int = 128,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The recurrence on T tokens of B sequences from `state`, `chunk_size` tokens at a time.

    q, k [B, H, T, K]; v [B, H, T, V]; state [B, H, V, K]; z [B, H, K] or None. Returns the outputs
    [B, H, T, V], and the state and denominator after the last token. Nothing changes in place.
    Differentiable.
    """
    length = q.shape[-2]
    qs, ks, vs = (_split(x, chunk_size) for x in (q, k, v))
    borders, state = _running(vs.transpose(-1, -2) @ ks, state)
    z_borders = None
    if z is not None:
        z_borders, z = _running(ks.sum(-2), z)
    out = read_chunks(qs, ks, vs, borders, z_borders)
    return out.flatten(2, 3)[:, :, :length], state, z


def chunked_with_decay(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, state: Tensor, *, chunk_size: int = 128
) -> tuple[Tensor, Tensor]:
    """As `chunked`, with the decays w [B, H, T] in [0, 1] and without denominator."""
    length = q.shape[-2]
    qs, ks, vs = (_split(x, chunk_size) for x in (q, k, v))
    padded = torch.nn.functional.pad(w, (0, -length % chunk_size), value=1.0)
    sums = reference.log_decay(padded.unflatten(-1, (-1, chunk_size)))
    whole = sums[..., -1:]
    kept = (ks * (whole - sums).exp().unsqueeze(-1)).to(k.dtype)  # of a key, at the chunk's end
    borders = [state]
    for update, each in zip((vs.mT @ kept).unbind(2), whole.exp().unbind(2), strict=True):
        borders.append(borders[-1] * each.unsqueeze(-1) + update.to(state.dtype))
    scores = (qs @ ks.mT).tril() * reference.decays_between(sums).to(q.dtype)
    before = torch.stack(borders[:-1], dim=2).to(q.dtype)
    out = scores @ vs + sums.exp().unsqueeze(-1).to(q.dtype) * (qs @ before.mT)
    return out.flatten(2, 3)[:, :, :length], borders[-1]


def _split(x: Tensor, chunk_size: int) -> Tensor:
    """[B, H, T, D] → [B, H, chunks, chunk_size, D], padded with zeros, which add nothing."""
    padding = -x.shape[-2] % chunk_size
    x = torch.nn.functional.pad(x, (0, 0, 0, padding))
    split: Tensor = x.unflatten(-2, (-1, chunk_size))
    return split


def _running(updates: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """Updates [B, H, chunks, …] → the values before each chunk, and those after the last."""
    steps = torch.cat([initial.unsqueeze(2), updates.to(initial.dtype)], dim=2).cumsum(dim=2)
    return steps[:, :, :-1], steps[:, :, -1]

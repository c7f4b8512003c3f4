"""Which rows of a pool a batch moves, and by which tokens: worked out on the host, once per step.

Owns the check of slots where they are still Python's own numbers (on a GPU, looking would mean
waiting), and how long segments are cut into chunks. Knows no model, and does not know what
computes on the segments.

Letters: B segments, N tokens, M chunks of T tokens, G segments that are cut into chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Self

import torch
from cottention.engine.ops.reference import PADDING_SLOT
from torch import Tensor

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

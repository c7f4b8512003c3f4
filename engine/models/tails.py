"""The row before each token, kept in the pool from step to step: token shift.

A token's predecessor is the row before it in its segment, and for a segment's first token the row
that the pool keeps; afterwards the pool keeps the segment's last row. Zeros are before the start.
Convolutions of more than two taps have `ops.short_convolution`.

Letters: N tokens, B segments, C channels, S rows of the pool.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from cottention.engine import ops


@dataclass(frozen=True, slots=True)
class TokenShift:
    """Which rows a batch's tokens follow. Prepared once for all layers of a step.

    rows, last int64 [B]: a segment's row of the pool, and its last token; None stands for one token
    per segment. first: of segments with more than one token, their first tokens. is_real: a bool
    tensor of one element, false where all segments are padding; None: known to be true.
    """

    rows: Tensor
    first: Tensor | None
    last: Tensor | None
    is_real: Tensor | None

    @classmethod
    def of(cls, segments: ops.Segments) -> Self:
        """For the segments of a batch.

        Padding is given what the first real segment has, so that the pool's rows are written with
        equal values only, the shapes do not depend on values, and nothing waits for a device.
        """
        rows, bounds = segments.state_indices.long(), segments.cu_seqlens
        first = None if bounds is None else bounds[:-1].long()
        last = None if bounds is None else bounds[1:].long() - 1
        is_padding = rows < 0
        if rows.device.type == "cpu" and not is_padding.any():
            return cls(rows, first, last, None)
        source = is_padding.logical_not().int().argmax().unsqueeze(0)
        rows = torch.where(is_padding, rows[source], rows).clamp_min(0)
        places = torch.arange(len(rows), device=rows.device) if last is None else last
        return cls(
            rows, first, torch.where(is_padding, places[source], places), ~is_padding[source]
        )

    def __call__(self, x: Tensor, tail: Tensor) -> Tensor:
        """x [N, C] → the rows before [N, C], in the type of x; tail [S, C] is updated.

        Rows of padding tokens are those of some other token.
        """
        kept = tail.index_select(0, self.rows)
        new = x if self.last is None else x.index_select(0, self.last)
        new = new.to(tail.dtype)
        if self.is_real is not None:
            new = torch.where(self.is_real.unsqueeze(-1), new, kept)
        tail.index_copy_(0, self.rows, new)
        kept = kept.to(x.dtype)
        return kept if self.first is None else x.roll(1, 0).index_copy_(0, self.first, kept)

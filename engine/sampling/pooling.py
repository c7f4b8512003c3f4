"""Hidden states of a text to one vector.

Letters: R rows, C channels.
"""

import torch
from torch import Tensor

from cottention.engine.encoding import Pooling
from cottention.engine.ops.reference import NORM_FLOOR


class Pooler:
    """Pools the rows of one text, which are added in token order, in parts of any size.

    The result does not depend on the parts: sums are made row by row, in float64.
    """

    def __init__(self, pooling: Pooling, *, normalize: bool) -> None:
        self._pooling = pooling
        self._normalize = normalize
        self._num_rows = 0
        self._value: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add the next rows [R, C], at least one."""
        self._num_rows += len(rows)
        rows, before = rows.double(), self._value
        match self._pooling:
            case "mean":
                terms = rows if before is None else torch.cat([before.unsqueeze(0), rows])
                self._value = terms.cumsum(dim=0)[-1].clone()
            case "max":
                most = rows.amax(dim=0)
                self._value = most if before is None else torch.maximum(before, most)
            case "cls":
                self._value = rows[0].clone() if before is None else before
            case "last":
                self._value = rows[-1].clone()

    def result(self) -> bytes:
        """The vector [C] as float32, of Euclidean norm 1 if that was asked for."""
        assert self._value is not None
        value = self._value / self._num_rows if self._pooling == "mean" else self._value
        if self._normalize:
            value = value / value.norm().clamp_min(NORM_FLOOR)
        return bytes(value.to("cpu", torch.float32).numpy().astype("<f4").tobytes())

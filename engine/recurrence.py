"""Where the recurrences of one batch live.

Owns the joining of a pool's layers with the slots and segments of a batch. Does not know whose
they are or what computes on them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from engine import ops
from engine.feature_maps import Features


@dataclass(frozen=True, slots=True)
class Recurrence:
    """An `Attend` on rows of a pool.

    layer: index → views state [S, H, V, K] and z [S, H, K] or None of that layer.
    """

    layer: Callable[[int], tuple[Tensor, Tensor | None]]
    segments: ops.Segments

    def __call__(self, index: int, features: Features) -> Tensor:
        """Mapped q, k, v [N, H, ·] of layer `index` → outputs [N, H, V]; its rows move on."""
        return ops.recurrent_segments(*features, *self.layer(index), self.segments)

"""Where the recurrences of one batch live.

Owns the joining of a pool's rows with the slots and segments of a batch. Does not know whose they
are or what computes on them.
"""

from dataclasses import dataclass

from cottention.engine import ops
from cottention.engine.feature_maps import Features
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Recurrence:
    """An `Attend` on rows of a pool.

    state [S, L, H, V, K] and z [S, L, H, K] or None: of all layers, changed in place.
    """

    state: Tensor
    z: Tensor | None
    segments: ops.Segments

    def layer(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Views [S, H, V, K] and [S, H, K] or None of one layer."""
        return self.state[:, index], None if self.z is None else self.z[:, index]

    def __call__(self, index: int, features: Features) -> Tensor:
        """Mapped q, k, v [N, H, ·] of layer `index` → outputs [N, H, V]; its rows move on."""
        return ops.recurrent_segments(*features, *self.layer(index), self.segments)

"""The recurrence of one batch, on rows of the pool.

Letters: N tokens, S rows of the pool, L layers, H heads, V value width, K key width.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from cottention.engine import ops
from cottention.engine.state.delayed_updates import DelayedUpdates


class Features(NamedTuple):
    """Queries and keys [..., N, H, K] and values [..., N, H, V], as the recurrence takes them.

    w [..., N, H] or [..., N, H, K], the decay, and a, b [..., N, H, K] are those of
    `ops.recurrent_step`; None: without.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None


class Recurrence:
    """Updates the rows of one batch, in place.

    tensors: the pool's, by name. state [S, L, H, V, K] and z [S, L, H, K] or None: those named
    `state` and `denominator`. segments: which row each token belongs to. delayed: the pool's, where
    each segment has one token and the step is to delay its update; else the rows are settled.
    """

    __slots__ = ("delayed", "segments", "state", "tensors", "z")

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        segments: ops.Segments,
        delayed: DelayedUpdates | None = None,
    ) -> None:
        self.tensors = tensors
        self.delayed = delayed
        self.segments = segments
        self.state = tensors["state"]
        self.z = tensors.get("denominator")

    def layer(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Views [S, H, V, K] and [S, H, K] or None of one layer."""
        return self.state[:, index], None if self.z is None else self.z[:, index]

    def __call__(self, index: int, features: Features) -> Tensor:
        """Features [N, H, ·] of layer `index` → outputs [N, H, V]; its rows are updated."""
        q, k, v, w, a, b = features
        state, z = self.layer(index)
        return ops.recurrent_segments(q, k, v, state, z, self.segments, w=w, a=a, b=b)

"""Attention of the maps besides Cottention's on CUDA: few kernels from product to product.

One maps q, k and v and computes the gelu, the recurrence is one or two, and one writes the outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cottention.engine.models.gptj.feature_maps.base import TokenPositions

if TYPE_CHECKING:
    from torch import Tensor

    from cottention.engine.models.recurrence import Recurrence
    from cottention.engine.ops import MapKind


@dataclass(frozen=True, slots=True)
class MappedAttention:
    """A `FusedAttention` of a map that `ops.map_gelu` computes.

    A layer's weights of the map are its projection, if it has one, and the weight and bias of its
    gate, if it has one. floor: of the denominators that are a row of the state.
    """

    kind: "MapKind"
    floor: float = 0.0

    def __call__(
        self,
        normed: "Tensor",
        joined: "Tensor",
        at: TokenPositions,
        weights: Sequence["Tensor"],
        recurrence: "Recurrence",
        layer: int,
        out: "Tensor",
    ) -> None:
        """joined [N, 3C + inner] to out [N, C + inner]; the batch's rows of the layer change."""
        from cottention.engine import ops
        from cottention.engine.models.recurrence import Features

        gate = weights[1:]
        _, heads, value_width, _ = recurrence.layer(layer)[0].shape
        mapped = ops.map_gelu(
            self.kind,
            joined,
            at.cos,
            at.sin,
            out,
            heads,
            value_width,
            table=at.table,
            projection=weights[0] if weights else None,
            gate=(normed, *gate) if gate else (),
        )
        mixed = recurrence(layer, Features(*mapped))
        channels = (joined.shape[1] - out.shape[1]) // 2
        attended = out[:, :channels].unflatten(1, (heads, -1))
        if value_width > attended.shape[-1]:
            ops.divide_outputs(mixed, self.floor, attended)
        else:
            attended.copy_(mixed)

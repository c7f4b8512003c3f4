"""What kinds of attention with random features share: their number, and their denominator.

Letters: N tokens, H heads, D head width, V value width.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from cottention.engine.models.gptj.feature_maps.base import AttentionConfig, FeatureMap

if TYPE_CHECKING:
    from torch import Tensor

DENOMINATOR_COLUMNS = 8
"""Columns beside the values: a one and zeros, since the kernels take widths in eights."""


class RandomFeatures(FeatureMap):
    """A map by a fixed random projection, whose denominator is a row of the state.

    The values are continued by a 1, so that the recurrence sums the scores as it sums the values,
    and `outputs` divides by that sum. The denominator that the recurrence itself can keep counts
    all below 1e-6 as 1e-6, which is exact for neither map: Performer's denominators are positive
    and may be far smaller, RFA's may be negative.

    The projection is drawn per layer, as other weights are: the errors of the layers are then
    independent. It is a buffer, which training does not change; weights files have it, so it is
    part of a session's fingerprint.

    denominator_floor: a denominator closer to 0 counts as this number with its sign; zero, which
    only outputs of padding have beside RFA, counts as positive.
    """

    denominator_floor: ClassVar[float]

    @abstractmethod
    def default_num_features(self, head_dim: int) -> int:
        """Random features per head where a config.json does not say: keys of width 2D."""

    def num_features(self, config: AttentionConfig) -> int:
        """Rows of the projection of one head."""
        return config.num_random_features or self.default_num_features(config.head_dim)

    def value_width(self, config: AttentionConfig) -> int:
        return config.head_dim + DENOMINATOR_COLUMNS

    def outputs(self, mixed: "Tensor") -> "Tensor":
        import torch

        out, total, _ = mixed.split(
            [mixed.shape[-1] - DENOMINATOR_COLUMNS, 1, DENOMINATOR_COLUMNS - 1], dim=-1
        )
        out, total = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (out, total))
        floor = torch.where(total < 0, -self.denominator_floor, self.denominator_floor)
        near_zero = total.abs() < self.denominator_floor
        return out / torch.where(near_zero, floor.to(total.dtype), total)


def with_denominator(v: "Tensor") -> "Tensor":
    """v [..., V] continued by a 1 and zeros, [..., V + 8]."""
    import torch

    columns = v.new_zeros(DENOMINATOR_COLUMNS)
    columns[:1].fill_(1)
    return torch.cat([v, columns.expand(*v.shape[:-1], -1)], dim=-1)

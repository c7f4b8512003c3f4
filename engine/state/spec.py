"""A state's shape and exact bytes, itemised. Knows no torch."""

import math
from dataclasses import dataclass
from typing import Self

from cottention.engine.models.attention_kinds import ATTENTION_KINDS
from cottention.engine.models.config import ModelConfig

STATE_BYTES_PER_ELEMENT = 4
"""State is float32: facts of the papers' precision table."""


@dataclass(frozen=True, slots=True)
class StateSpec:
    """Exact shape and bytes of one session's state in the pool; nothing in it depends on length.

    has_spare: whether a slot has a second row, in which the state after the next renewal grows.
    """

    layers: int
    heads: int
    value_width: int
    key_width: int
    has_denominator: bool
    has_spare: bool = False

    @classmethod
    def of(cls, config: ModelConfig, *, has_spare: bool = False) -> Self:
        """The state that a model of this shape keeps; with a spare, a slot has room for two."""
        kind = ATTENTION_KINDS[config.attention_type]
        return cls(
            layers=config.n_layer,
            heads=config.n_head,
            value_width=config.head_dim,
            key_width=kind.key_width(config.head_dim),
            has_denominator=kind.has_denominator,
            has_spare=has_spare,
        )

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """[L, H, V, K] of one slot."""
        return self.layers, self.heads, self.value_width, self.key_width

    @property
    def denominator_shape(self) -> tuple[int, int, int]:
        """[L, H, K] of one slot."""
        return self.layers, self.heads, self.key_width

    def itemised_bytes(self) -> dict[str, int]:
        """Bytes of one slot, by what they hold."""
        state = math.prod(self.state_shape) * STATE_BYTES_PER_ELEMENT
        denominator = math.prod(self.denominator_shape) * STATE_BYTES_PER_ELEMENT
        denominator = denominator if self.has_denominator else 0
        spare = state + denominator if self.has_spare else 0
        return {"state": state, "denominator": denominator, "spare": spare}

    @property
    def bytes_per_slot(self) -> int:
        """All bytes of one slot."""
        return sum(self.itemised_bytes().values())

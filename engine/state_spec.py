"""A state's shape and exact bytes, itemised. Knows no torch."""

import math
from dataclasses import dataclass
from typing import Self

from engine.model_config import ModelConfig

STATE_BYTES_PER_ELEMENT = 4
"""State is float32: facts of the papers' precision table."""


@dataclass(frozen=True, slots=True)
class StateSpec:
    """Exact shape and bytes of one session's state in the pool; nothing in it depends on length."""

    layers: int
    heads: int
    value_width: int
    key_width: int
    has_denominator: bool

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """The state that a model of this shape keeps."""
        from engine.feature_maps import FEATURE_MAPS

        feature_map = FEATURE_MAPS[config.attention_type]
        return cls(
            layers=config.n_layer,
            heads=config.n_head,
            value_width=config.head_dim,
            key_width=feature_map.key_width(config.head_dim),
            has_denominator=feature_map.has_denominator,
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
        denominator = math.prod(self.denominator_shape) if self.has_denominator else 0
        return {
            "state": math.prod(self.state_shape) * STATE_BYTES_PER_ELEMENT,
            "denominator": denominator * STATE_BYTES_PER_ELEMENT,
        }

    @property
    def bytes_per_slot(self) -> int:
        """All bytes of one slot."""
        return sum(self.itemised_bytes().values())

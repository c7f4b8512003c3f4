"""Shape and exact bytes of a session's state. Loads no torch.

Letters: L layers, H heads, V value width, K key width.
"""

import math
from dataclasses import dataclass
from typing import Literal

StateDType = Literal["float32"]

BYTES_PER_ELEMENT: dict[StateDType, int] = {"float32": 4}


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One named tensor of a state.

    shape: of one sequence, its layers first: [L, ...].
    """

    name: str
    shape: tuple[int, ...]
    dtype: StateDType = "float32"

    @property
    def nbytes(self) -> int:
        """Bytes of one sequence."""
        return math.prod(self.shape) * BYTES_PER_ELEMENT[self.dtype]


def recurrence_tensors(
    *, layers: int, heads: int, value_width: int, key_width: int, has_denominator: bool = False
) -> tuple[StateTensor, ...]:
    """`state` [L, H, V, K] and, where outputs are divided by one, `denominator` [L, H, K]."""
    state = StateTensor("state", (layers, heads, value_width, key_width))
    if not has_denominator:
        return (state,)
    return state, StateTensor("denominator", (layers, heads, key_width))


@dataclass(frozen=True, slots=True)
class StateSpec:
    """The tensors of one sequence's state; nothing in them depends on its length.

    tensors: their names differ; one is `state` [L, H, V, K], the recurrence's own.
    has_spare: whether a slot of the pool has a second row, for the state after the next renewal.
    delayed_updates: tokens of which a row of the pool has the updates apart, until a step writes
    them to the state; with fewer than 2, each is written at once and nothing is kept.
    """

    tensors: tuple[StateTensor, ...]
    has_spare: bool = False
    delayed_updates: int = 0

    def __post_init__(self) -> None:
        names = [tensor.name for tensor in self.tensors]
        assert "state" in names
        assert not {"spare", "delayed"} & {*names}
        assert len({*names}) == len(names)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor [L, ...] of one state, by its name."""
        return {tensor.name: tensor.shape for tensor in self.tensors}

    @property
    def value_width(self) -> int:
        """V of the recurrence."""
        return self.shapes["state"][-2]

    @property
    def key_width(self) -> int:
        """K of the recurrence."""
        return self.shapes["state"][-1]

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one state."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def softmax_bytes_per_token(self) -> int:
        """Bytes that a softmax model of the same layers and heads would add to its key-value cache
        with each token: a key and a value, V wide, of float32.
        """
        layers, heads, value_width, _ = self.shapes["state"]
        return 2 * layers * heads * value_width * BYTES_PER_ELEMENT["float32"]

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of one slot of the pool: of a state, of its spare, and of their delayed updates."""
        return sum(self.itemised_bytes().values())

    def itemised_bytes(self) -> dict[str, int]:
        """Bytes of one slot, by tensor; `denominator` and `spare` are 0 where there is none.

        `delayed` is among them only where updates are delayed.
        """
        items = {"state": 0, "denominator": 0}
        items |= {tensor.name: tensor.nbytes for tensor in self.tensors}
        items |= {"spare": self.bytes_per_row if self.has_spare else 0}
        if self.delayed_updates > 1:
            items["delayed"] = self._delayed_bytes_per_row * (2 if self.has_spare else 1)
        return items

    @property
    def _delayed_bytes_per_row(self) -> int:
        """A key and a value of each layer and head for each update, and their number."""
        layers, heads, value_width, key_width = self.shapes["state"]
        numbers = self.delayed_updates * layers * heads * (key_width + value_width)
        return numbers * BYTES_PER_ELEMENT["float32"] + 4

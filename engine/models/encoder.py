"""What an encoder's family gives the engine: its served form, and what a text's rows are fed.

An encoder reads a text as a whole. In each layer one pass over all its rows sums a state of fixed
size, and a second pass reads it. Between layers a text is one residual stream [N, C] in float32,
whose rows are processed in chunks of any size.

Letters: N tokens of a text, R rows of a chunk, C channels.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # a configuration is read without torch
    from torch import Tensor

    from cottention.engine.models.recurrence import Recurrence


@dataclass(frozen=True, slots=True)
class EncoderRows:
    """Consecutive rows of one text or several, all of one layer.

    positions: int64 [R], each row's place in its text, from 0. lengths: int64 [R], the number of
    tokens of its text. recurrence: the state of each row's text, of one layer.
    """

    positions: "Tensor"
    lengths: "Tensor"
    recurrence: "Recurrence"


class ServedEncoder(Protocol):
    """An encoder arranged for inference. It keeps no text's state."""

    num_layers: int
    width: int
    has_predictions: bool

    def embed(self, ids: "Tensor", positions: "Tensor") -> "Tensor":
        """ids, positions int64 [R] → rows float32 [R, C] of the stream before the first layer."""
        ...

    def accumulate(self, layer: int, x: "Tensor", rows: EncoderRows) -> None:
        """First pass: add the rows x [R, C] to the states of their texts."""
        ...

    def update(self, layer: int, x: "Tensor", rows: EncoderRows) -> None:
        """Second pass, once the states are whole: replace x [R, C] by the layer's output."""
        ...

    def predictions(self, hidden: "Tensor") -> "Tensor":
        """Last hidden states [R, C] → logits float32 [R, vocab_size] of the masked tokens."""
        ...

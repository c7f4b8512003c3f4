"""What is asked of a text's last hidden states, in place of a continuation, and the answer.

Loads no torch.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from cottention.engine.errors import ParameterError

Pooling = Literal["mean", "cls", "max", "last"]
"""Of hidden states to one vector: their mean or maximum, or those of the first or last token."""

Capability = Literal["completions", "chat", "sessions", "embeddings", "fill-mask"]
"""What a served model can do."""

MAX_PREDICTIONS = 100
"""Largest number of tokens predicted for one masked place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeParams:
    """An embedding of the prompt, or predictions of its masked tokens.

    mask_id: the id in whose places tokens are predicted; None: the embedding is asked for.
    top_k: number of most probable ids for each place, 1 to 100. targets: the only ids to report, at
    most 100 of them; None: all that have a token. Raises ParameterError.
    """

    mask_id: int | None = None
    top_k: int = 5
    targets: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= MAX_PREDICTIONS:
            raise ParameterError(
                "top_k",
                f"top_k must be a whole number from 1 to {MAX_PREDICTIONS}; it is {self.top_k}",
            )
        if self.targets is not None and not 1 <= len(self.targets) <= MAX_PREDICTIONS:
            raise ParameterError(
                "targets",
                f"targets must have 1 to {MAX_PREDICTIONS} tokens; it has {len(self.targets)}",
            )


class MaskPrediction(NamedTuple):
    """A masked place by its index in the prompt's ids, and (id, probability) in descending order.

    A probability is that of the softmax over the whole vocabulary, whatever the targets.
    """

    position: int
    tokens: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """The answer: an embedding [C] as bytes of float32, little-endian, or predictions."""

    embedding: bytes = b""
    masks: tuple[MaskPrediction, ...] = ()

"""What one step computes. Does not know who decides. Knows no torch."""

from dataclasses import dataclass, field
from typing import NamedTuple

from cottention.engine.outputs import SampledToken, TokenLogprob
from cottention.engine.scheduling.request import Choice, Request
from cottention.engine.state.context_window import PrefillSpan
from cottention.engine.state.prefix_cache import BLOCK


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Ids start:stop of a request, to be read in one step."""

    request: Request
    read: PrefillSpan
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether the prompt is complete with it."""
        return self.stop == self.request.stop and not self.read.is_spare

    @property
    def row(self) -> int:
        """Where they go."""
        first = self.request.choices[0]
        return first.spare if self.read.is_spare else first.row


class LookaheadRow(NamedTuple):
    """A choice whose next id goes into its spare row, too, and the context that row begins with."""

    choice: Choice
    start: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work: choices that take one token each, chunks of prompts, and spare rows."""

    decode: list[Choice]
    prefill: list[PrefillChunk]
    ahead: list[LookaheadRow] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)

    @property
    def requests(self) -> list[Request]:
        """Everyone with work in this step, once."""
        everyone = [choice.request for choice in self.decode]
        return list(dict.fromkeys(everyone + [chunk.request for chunk in self.prefill]))


class Sample(NamedTuple):
    """An id drawn for a choice."""

    choice: Choice
    drawn: SampledToken


class BatchResult(NamedTuple):
    """What a step brought: ids, choices for which none could be drawn, scores of prompts' ids."""

    samples: list[Sample]
    undrawn: list[Choice]
    scores: dict[Request, list[TokenLogprob]]


def stop_of(request: Request, most: int) -> int:
    """Where a chunk ends: of a prompt whose state may be reused, at a whole block if it can."""
    read = request.reads[0]
    end = min(read.stop, most)
    if request.prefix is None or read.is_spare:
        return end
    whole = min(end, read.stop - 1) // BLOCK * BLOCK
    return whole if whole > request.num_read else end

"""What one step computes, and its result."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from cottention.engine.outputs import SampledToken, TokenLogprob
from cottention.engine.scheduling.request import Choice, Request
from cottention.engine.state.context_window import PrefillSpan

if TYPE_CHECKING:  # batches are scheduled without torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Ids at indices start:stop of a request, part of `span`, to be prefilled in one step."""

    request: Request
    span: PrefillSpan
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether it completes the prompt."""
        return self.stop == self.request.prefill_stop and not self.span.is_spare

    @property
    def row(self) -> int:
        """The pool's row that the ids are fed to."""
        first = self.request.choices[0]
        return first.spare_row if self.span.is_spare else first.row


class LookaheadRow(NamedTuple):
    """A decoding choice whose next id is also fed to its spare row.

    start: first index of the context that the spare row holds.
    """

    choice: Choice
    start: int


@dataclass(frozen=True, slots=True)
class Batch:
    """The work of one step: choices that decode one token, prompt chunks, and lookahead rows.

    late: choices that are sampled from the logits of an earlier step.
    """

    decode: list[Choice]
    prefill: list[PrefillChunk]
    lookahead: list[LookaheadRow] = field(default_factory=list)
    late: list[Choice] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill or self.late)

    @property
    def requests(self) -> list[Request]:
        """Every request in the batch, without repetition."""
        requests = [choice.request for choice in [*self.decode, *self.late]]
        return list(dict.fromkeys(requests + [chunk.request for chunk in self.prefill]))


class Sample(NamedTuple):
    """An id that was sampled for a choice."""

    choice: Choice
    token: SampledToken


class BatchResult(NamedTuple):
    """The result of a step.

    unsampled: choices for which no id could be sampled. prompt_logprobs: of the prompt ids that
    follow those of each chunk, where the request asks for them. embeddings: of the requests whose
    prompts are complete and that ask for one. late_logits: float32 [1, N] each, of choices whose
    grammars' masks were not there in time.
    """

    samples: list[Sample]
    unsampled: list[Choice]
    prompt_logprobs: dict[Request, list[TokenLogprob]]
    embeddings: Mapping[Request, bytes] = MappingProxyType({})
    late_logits: Mapping[Choice, "Tensor"] = MappingProxyType({})

"""What one step computes, and its result."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cottention.engine.outputs import TokenLogprob
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

    start: first index of the context that the spare row holds. token_index: of the id.
    """

    choice: Choice
    start: int
    token_index: int


@dataclass(frozen=True, slots=True)
class Batch:
    """The work of one step: choices that decode one token, prompt chunks, and lookahead rows.

    indices: of the id that each decoding choice is fed. renewed: those whose context begins anew
    with it. late: choices that are sampled from the logits of an earlier step.
    num_ahead: so many of the decoding choices, the first, are fed the ids that the step before
    samples, which are on the device.
    """

    decode: list[Choice]
    prefill: list[PrefillChunk]
    lookahead: list[LookaheadRow] = field(default_factory=list)
    late: list[Choice] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    renewed: list[Choice] = field(default_factory=list)
    num_ahead: int = 0

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill or self.late)

    @property
    def requests(self) -> list[Request]:
        """Every request in the batch, without repetition."""
        requests = [choice.request for choice in [*self.decode, *self.late]]
        return list(dict.fromkeys(requests + [chunk.request for chunk in self.prefill]))


class TokenIds(Protocol):
    """Sampled ids, which a device may still compute."""

    def tolist(self) -> list[int]:
        """The ids; waits until they are there."""
        ...


class BatchResult(NamedTuple):
    """The result of a step.

    choices, token_ids: the id that was sampled for each choice; NO_INDEX where none could be.
    logprobs: of the ids, where requested. prompt_logprobs: of the prompt ids that follow those of
    each chunk, where the request asks for them. embeddings: of the requests whose prompts are
    complete and that ask for one. late_logits: float32 [1, N] each, of choices whose grammars'
    masks were not there in time.
    """

    choices: Sequence[Choice]
    token_ids: TokenIds
    logprobs: Mapping[Choice, TokenLogprob] = MappingProxyType({})
    prompt_logprobs: Mapping[Request, list[TokenLogprob]] = MappingProxyType({})
    embeddings: Mapping[Request, bytes] = MappingProxyType({})
    late_logits: Mapping[Choice, "Tensor"] = MappingProxyType({})


NO_IDS = array("q")

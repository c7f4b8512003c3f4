"""A request inside the engine, and the choices that are generated for it. Knows no torch.

A request's prompt is read once, into the slot of its first choice; the others start as copies.
"""

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from engine.detokenizer import Detokenizer
from engine.history import History
from engine.outputs import FinishReason, TokenLogprob
from engine.params import SamplingParams
from engine.tokenizer import Tokenizer


@dataclass(slots=True, eq=False)
class Choice:
    """One continuation of a request's prompt.

    position counts the ids that are in the state; pending are those that were sampled and are not.
    """

    request: "Request"
    index: int
    detokenizer: Detokenizer
    history: History
    position: int
    pending: list[int] = field(default_factory=list)
    num_generated: int = 0
    finish_reason: FinishReason | None = None

    @property
    def slot(self) -> int:
        """Its row in the pool; only an admitted request has slots."""
        return self.request.slots[self.index]

    def note(self, token_id: int) -> None:
        """An id has been drawn; it is not in the state yet."""
        self.pending.append(token_id)
        self.history.note(token_id)
        self.num_generated += 1
        if self.num_generated == self.request.params.min_tokens:
            self.detokenizer.watch(self.request.params.stop)

    def barred_ids(self) -> list[int]:
        """Ids that may not be drawn now: the end before its time, and the last of a bad word."""
        too_early = self.num_generated < self.request.params.min_tokens
        return [*(self.request.end_ids if too_early else ()), *self.history.barred_ids()]


@dataclass(slots=True, eq=False)
class Request:
    """A prompt, what is wanted of it, and how far it has come.

    end_ids: ids that end a choice. slots: one a choice while it is admitted, else empty.
    scores: of the prompt as far as it has been read, where they are asked for.
    """

    id: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    seed: int
    end_ids: frozenset[int]
    priority: int = 0
    slots: list[int] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    num_prefilled: int = 0
    scores: list[TokenLogprob | None] = field(default_factory=lambda: [None])

    @classmethod
    def new(
        cls,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        eos_token_ids: Iterable[int],
    ) -> "Request":
        """A request nobody has worked on; draws a fresh seed where none is given."""
        seed = secrets.randbits(63) if params.seed is None else params.seed
        ends = frozenset(params.stop_token_ids)
        ends |= frozenset(() if params.ignore_eos else eos_token_ids)
        request = cls(request_id, tuple(prompt_ids), params, seed, ends)
        bad_words = _bad_words(params, tokenizer)
        table = tokenizer.token_bytes if params.skip_special_tokens else tokenizer.written_bytes
        for index in range(params.n):
            text = Detokenizer(table, () if params.min_tokens else params.stop)
            history = History(params, request.prompt_ids, bad_words)
            request.choices.append(Choice(request, index, text, history, len(prompt_ids)))
        return request

    @property
    def unfinished(self) -> list[Choice]:
        """Choices that still grow, or have not begun to."""
        return [choice for choice in self.choices if choice.finish_reason is None]


def _bad_words(params: SamplingParams, tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of each word as it stands and as it follows a space."""
    spellings = [start + word.lstrip(" ") for word in params.bad_words for start in ("", " ")]
    return [tokenizer.encode(spelling) for spelling in spellings]

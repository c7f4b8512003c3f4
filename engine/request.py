"""A request inside the engine, and the choices that are generated for it. Knows no torch.

A request's prompt is read once, into the slot of its first choice; the others start as copies.
"""

import secrets
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from engine.detokenizer import Detokenizer
from engine.history import History
from engine.outputs import FinishReason, TokenLogprob
from engine.params import SamplingParams
from engine.prefix_cache import Prefix
from engine.session_state import SessionState
from engine.tokenizer import Tokenizer


@dataclass(slots=True, eq=False)
class Choice:
    """One continuation of a request's prompt.

    position counts the ids that are in the state; pending are those that were sampled and are not.
    drawn: all that were sampled, where a session is to hold them.
    """

    request: "Request"
    index: int
    detokenizer: Detokenizer
    history: History
    position: int
    pending: list[int] = field(default_factory=list)
    drawn: "array[int]" = field(default_factory=lambda: array("i"))
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
        if self.request.start is not None:
            self.drawn.append(token_id)
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

    prompt_ids: all that is to be fed: of a session, also what its state has not had yet.
    end_ids: ids that end a choice. slots: one a choice while it is admitted, else empty.
    scores: of the prompt as far as it has been read, where they are asked for.
    start, turn_ids: the session that the request goes on with, and what is new in its prompt.
    prefix: of the ids in the first choice's state, where it may be reused. num_cached: ids of the
    prompt that were not read, since a state after them was there. started: when it had its slots.
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
    start: SessionState | None = None
    turn_ids: tuple[int, ...] = ()
    prefix: Prefix | None = None
    num_cached: int = 0
    started: float | None = None

    @classmethod
    def new(
        cls,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        eos_token_ids: Iterable[int],
        start: SessionState | None = None,
    ) -> "Request":
        """A request nobody has worked on; draws a fresh seed where none is given."""
        first, fed = start or SessionState(), tuple(prompt_ids)
        if start is not None:
            fed = _to_feed(start, fed, params)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        ends = frozenset(params.stop_token_ids)
        ends |= frozenset(() if params.ignore_eos else eos_token_ids)
        request = cls(request_id, fed, params, seed, ends, start=start, turn_ids=tuple(prompt_ids))
        bad_words = _bad_words(params, tokenizer)
        table = tokenizer.token_bytes if params.skip_special_tokens else tokenizer.written_bytes
        undecoded = b"" if prompt_ids else first.undecoded
        for index in range(params.n):
            text = Detokenizer(table, () if params.min_tokens else params.stop, undecoded)
            history = History(params, fed, bad_words, first.counts)
            request.choices.append(Choice(request, index, text, history, first.position + len(fed)))
        return request

    def reuse(self, scope: str) -> None:
        """Keep and take states after prompts, unless the whole prompt must be read, or is not."""
        if self.start is None and self.params.prompt_logprobs is None:
            self.prefix = Prefix(scope)

    @property
    def first_position(self) -> int:
        """Position of prompt_ids[0]: the ids that a session's state has had."""
        return 0 if self.start is None else self.start.position

    @property
    def unfinished(self) -> list[Choice]:
        """Choices that still grow, or have not begun to."""
        return [choice for choice in self.choices if choice.finish_reason is None]


def _to_feed(
    start: SessionState, prompt_ids: tuple[int, ...], params: SamplingParams
) -> tuple[int, ...]:
    """What the state has not had; the last id stays out where nothing is to be drawn after it."""
    ids = start.pending + prompt_ids
    return ids if params.max_tokens else ids[:-1]


def _bad_words(params: SamplingParams, tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of each word as it stands and as it follows a space."""
    spellings = [start + word.lstrip(" ") for word in params.bad_words for start in ("", " ")]
    return [tokenizer.encode(spelling) for spelling in spellings]

"""A request inside the engine: its prompt, and how far it has come. Knows no torch.

A request's prompt is read once, into the rows of its first choice; the others start as copies.
Ids are named by their absolute index: their place in the sequence, a session's past included.

One continuation of a request's prompt. Knows no torch.

What a request tells once: with its choice 0. Knows no torch.
"""

import secrets
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cottention.engine.outputs import FinishReason, TokenLogprob
from cottention.engine.sampling.token_history import TokenHistory, spellings
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.state.context_window import (
    ContextSchedule,
    ExactSchedule,
    PrefillSpan,
    prefill_spans,
)
from cottention.engine.state.prefix_cache import Prefix
from cottention.engine.state.session_state import SessionState
from cottention.engine.text.detokenizer import Detokenizer
from cottention.engine.text.tokenizer import Tokenizer


@dataclass(slots=True, eq=False)
class Choice:
    """One continuation of a request's prompt.

    position counts the ids that have been fed; pending are those that were sampled and were not.
    drawn: all that were sampled, where a session is to hold them. rows: of the pool, the one that
    the choice runs in first, then its spare where there is one.
    """

    request: "Request"
    index: int
    detokenizer: Detokenizer
    history: TokenHistory
    position: int
    rows: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    drawn: "array[int]" = field(default_factory=lambda: array("i"))
    num_generated: int = 0
    finish_reason: FinishReason | None = None

    @property
    def row(self) -> int:
        """Where its state is; only an admitted request has rows."""
        return self.rows[0]

    @property
    def spare(self) -> int:
        """Where its state after the next renewal grows."""
        return self.rows[1]

    @property
    def ahead(self) -> int | None:
        """Where the context after this one begins, if what is fed next goes into the spare, too."""
        return self.request.grid.ahead(self.position, self.request.last)

    @property
    def context_start(self) -> int:
        """The oldest id that the next one is drawn with."""
        held = self.position + len(self.pending)
        return self.request.grid.start(held - 1) if held else 0

    def note(self, token_id: int) -> None:
        """An id has been drawn; it is not in the state yet."""
        self.pending.append(token_id)
        self.history.note(token_id)
        if self.request.start is not None:
            self.drawn.append(token_id)
        self.num_generated += 1
        if self.num_generated == self.request.params.min_tokens:
            self.detokenizer.watch(self.request.params.stop)

    def masked_token_ids(self) -> list[int]:
        """Ids that may not be drawn now: the end before its time, and the last of a bad word."""
        too_early = self.num_generated < self.request.params.min_tokens
        return [*(self.request.end_ids if too_early else ()), *self.history.masked_token_ids()]


@dataclass(slots=True, eq=False)
class Request:
    """A prompt, what is wanted of it, and how far it has come.

    ids, first: those that may be fed before any is drawn, and the index of the first of them: the
    prompt, and what is remembered of a session. stop: index behind the last of them that is fed.
    reads, num_read: what is still to be read of them, and up to where.
    grid: where the state is renewed. end_ids: ids that end a choice. slots: one a choice while
    it is admitted, else empty.
    scores: of the prompt as far as it has been read, where they are asked for.
    start, turn_ids: the session that the request goes on with, and what is new in its prompt.
    prefix: of the ids in the first choice's state, where it may be reused. num_cached: ids of the
    prompt that were not read, since a state after them was there. started: when it had its slots.
    """

    id: str
    ids: Sequence[int]
    first: int
    stop: int
    params: SamplingParams
    seed: int
    end_ids: frozenset[int]
    priority: int = 0
    grid: ContextSchedule = field(default_factory=ExactSchedule)
    slots: list[int] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    reads: deque[PrefillSpan] = field(default_factory=deque)
    num_read: int = 0
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
        grid: ContextSchedule | None = None,
    ) -> "Request":
        """A request nobody has worked on; draws a fresh seed where none is given."""
        before, new = start or SessionState(), tuple(prompt_ids)
        past, fed = before.past, before.pending + new
        if start is not None and not params.max_tokens:
            fed = fed[:-1]  # nothing is drawn after the last, so that it waits like a drawn one
        first, stop = before.num_tokens - len(past), before.position + len(fed)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        ends = frozenset(() if params.ignore_eos else eos_token_ids).union(params.stop_token_ids)
        request = cls(request_id, past + new, first, stop, params, seed, ends, start=start)
        request.turn_ids, request.grid = new, grid or ExactSchedule()
        request.plan_reads(before.position)
        request.add_choices(tokenizer, fed, before)
        return request

    def plan_reads(self, held: int) -> None:
        """What there is to read for a state that has had ids up to `held`."""
        is_scored = self.params.prompt_logprobs is not None
        self.read(prefill_spans(self.grid, held, self.stop, self.last, is_scored=is_scored))
        assert all(read.begin >= self.first for read in self.reads), "ids are missing"

    def add_choices(self, tokenizer: Tokenizer, fed: Sequence[int], before: SessionState) -> None:
        """Its continuations, after what is fed to the state of `before`."""
        params = self.params
        bad_words = spellings(params.bad_words, tokenizer)
        table = tokenizer.token_bytes if params.skip_special_tokens else tokenizer.written_bytes
        undecoded = b"" if self.turn_ids else before.undecoded
        for index in range(params.n):
            text = Detokenizer(table, () if params.min_tokens else params.stop, undecoded)
            history = TokenHistory(params, fed, bad_words, before.counts)
            self.choices.append(Choice(self, index, text, history, self.stop))

    def reuse(self, scope: str) -> None:
        """Keep and take states after prompts, unless the whole prompt must be read, or is not.

        What was read under another policy is of no use.
        """
        if self.start is None and self.params.prompt_logprobs is None:
            self.prefix = Prefix(f"{self.grid.name} {scope}")

    @property
    def last(self) -> int:
        """Index of the last id that can be fed: the one drawn last never is."""
        return self.stop + self.params.max_tokens - 2

    @property
    def goes_on(self) -> bool:
        """Whether the row of the session is what the prompt follows."""
        return bool(self.reads) and self.reads[-1].begin > self.reads[-1].start

    def read(self, reads: deque[PrefillSpan]) -> None:
        """What there is to be read from now on."""
        self.reads = reads
        self.num_read = reads[0].begin if reads else self.stop

    def has_read(self, stop: int) -> None:
        """The first of `reads` has come up to here."""
        self.num_read = stop
        if stop == self.reads[0].stop:
            self.reads.popleft()
            self.read(self.reads)

    def ids_at(self, start: int, stop: int) -> Sequence[int]:
        """Ids of these indices; fewer at the end."""
        return self.ids[start - self.first : stop - self.first]

    @property
    def unfinished(self) -> list[Choice]:
        """Choices that still grow, or have not begun to."""
        return [choice for choice in self.choices if choice.finish_reason is None]


def num_cached_of(choice: Choice) -> int:
    """Told once: with choice 0."""
    return choice.request.num_cached if choice.index == 0 else 0


def scores_of(choice: Choice) -> tuple[TokenLogprob | None, ...] | None:
    """The prompt's log-probabilities, told once: with choice 0."""
    wants = choice.request.params.prompt_logprobs is not None and choice.index == 0
    return tuple(choice.request.scores) if wants else None

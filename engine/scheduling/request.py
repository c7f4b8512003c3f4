"""A request, its choices and its status.

A prompt is prefilled once, into the rows of the first choice; the other choices start as copies.
An index counts from the start of the sequence, a session's earlier ids included.
"""

import secrets
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from cottention.engine.encoding import Encoded
from cottention.engine.outputs import FinishReason, TokenLogprob
from cottention.engine.sampling.token_history import TokenHistory
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.scheduling.client import DEFAULT_CLIENT, Client
from cottention.engine.scheduling.prefill_stops import MAX_ANSWER_IDS, CachedPrompt, CacheUse
from cottention.engine.state.context_window import (
    ContextSchedule,
    ExactSchedule,
    PrefillSpan,
    prefill_spans,
)
from cottention.engine.state.session_state import SessionState
from cottention.engine.text.base import BaseTokenizer
from cottention.engine.text.detokenizer import Detokenizer

if TYPE_CHECKING:  # they hold tensors; requests are scheduled without torch
    from torch import Tensor

    from cottention.engine.grammar.compiler import Grammar
    from cottention.engine.grammar.matcher import Matcher
    from cottention.engine.sampling.pooling import Pooler
    from cottention.engine.sampling.token_constraints import TokenConstraints


class RequestStatus(Enum):
    """Where a request is between its arrival and its last output.

    WAITING: for slots, since its arrival, since it was resumed, or since it gave its slots to
    another client. RUNNING: it has slots; its prompt is prefilled, then its choices decode. PAUSED:
    its states are parked on the host until it is resumed. FINISHED: every choice has ended.
    """

    WAITING = auto()
    RUNNING = auto()
    PAUSED = auto()
    FINISHED = auto()


_NEXT_STATUSES = {
    RequestStatus.WAITING: {RequestStatus.RUNNING, RequestStatus.PAUSED, RequestStatus.FINISHED},
    RequestStatus.RUNNING: {RequestStatus.WAITING, RequestStatus.PAUSED, RequestStatus.FINISHED},
    RequestStatus.PAUSED: {RequestStatus.WAITING, RequestStatus.FINISHED},
    RequestStatus.FINISHED: set[RequestStatus](),
}


@dataclass(slots=True, eq=False)
class Choice:
    """One continuation of a request's prompt.

    position: number of ids in its state, as far as steps are told. pending: ids sampled after
    them, not in the state yet. num_fed: the same with those of a step that is under way.
    slot: of the pool, while the request has slots and the choice has not ended. rows: of that slot,
    first the row in use, then the spare row where the pool has spare rows.
    generated_ids: all sampled ids, kept only for a request that continues a session, and, up to
    MAX_ANSWER_IDS, for one whose last state is cached.
    matcher: where its text is in the request's grammar, until it has ended; None without one.
    context, steady_until: the first index of the context in which it was scheduled last, and the
    index of the first id for which that, or that no row is computed ahead, may change.
    is_plain: whether all its ids from now on are sampled from unchanged logits.
    max_ahead: number of generated ids below which its next id may be computed before its last one
    is known. 0: never, since a session keeps the state that it ends with, without its last id.
    late_logits: float32 [1, N], of the next id, while that waits for the grammar's mask: `pending`
    is in the state then.
    """

    request: "Request"
    index: int
    detokenizer: Detokenizer
    history: TokenHistory
    position: int
    num_fed: int
    context: int = 0
    steady_until: int = 0
    slot: int | None = None
    rows: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    generated_ids: "array[int]" = field(default_factory=lambda: array("i"))
    num_generated: int = 0
    finish_reason: FinishReason | None = None
    matcher: "Matcher | None" = None
    late_logits: "Tensor | None" = None
    is_plain: bool = False
    max_ahead: int = 0

    @property
    def has_mask(self) -> bool:
        """Whether its next id can be sampled: it has no grammar, or its mask is there."""
        return self.matcher is None or self.matcher.is_ready

    @property
    def row(self) -> int:
        """The pool's row that holds its state."""
        return self.rows[0]

    @property
    def spare_row(self) -> int:
        """The pool's row in which its state after the next renewal is computed."""
        return self.rows[1]

    def lookahead_start(self, index: int) -> int | None:
        """First index of the next context, if the id at `index` belongs to that context, too."""
        return self.request.context_schedule.ahead(index, self.request.last_index)

    def enter_context(self, index: int) -> bool:
        """Note the context in which the id at `index` is computed; whether it is another one."""
        schedule, before = self.request.context_schedule, self.context
        self.context = schedule.start(index)
        self.steady_until = schedule.steady_until(index)
        return self.context != before

    @property
    def context_start(self) -> int:
        """Index of the oldest id that the next id depends on."""
        index = self.position + len(self.pending) - 1
        if index < self.steady_until:
            return self.context
        return self.request.context_schedule.start(index) if index >= 0 else 0

    def set_plain(self) -> None:
        """Note that its ids are sampled from unchanged logits from now on."""
        self.is_plain = True
        request = self.request
        self.max_ahead = 0 if request.start is not None else request.params.max_tokens - 1

    def append_token(self, token_id: int) -> None:
        """Add a sampled id, which is not in the state yet."""
        request = self.request
        self.pending.append(token_id)
        if self.history.matters:
            self.history.append(token_id)
        may_be_cached = request.cached_prompt is not None and self.num_generated < MAX_ANSWER_IDS
        if request.start is not None or (may_be_cached and request.keeps_answer):
            self.generated_ids.append(token_id)
        self.num_generated += 1

    @property
    def is_early(self) -> bool:
        """Whether the next id may not be a stop id, since there are fewer than min_tokens."""
        return self.num_generated < self.request.params.min_tokens


@dataclass(slots=True, eq=False)
class Request:
    """A prompt, its parameters, and how far it has been computed.

    ids, first_index: the ids before any generated one and the index of the first of them: the
    prompt, after what is known of the session's ids. prefill_stop: index after the last of them
    that is prefilled.
    prefill_spans, num_prefilled: what is still to be prefilled, and up to which index the first of
    the spans has been.
    client: on whose behalf it runs; lower `priority` starts first among the client's own.
    is_preempted: it waits because it had to give its slots to another client.
    context_schedule: where contexts begin. constraints: what its parameters say
    about ids.
    start, turn_ids: the session state that the request continues, and the prompt's own ids.
    replayed: ids that were generated before, elsewhere; they are prefilled after the prompt.
    cached_prompt: for requests that use the prefix cache. is_held: it waits for another's prefill;
    num_left_of_followers: prompt ids that the shortest prompt still has that waits for this one.
    prompt_logprobs, num_cached, started: per-request fields of the output, the first two sent with
    choice 0 only. num_cached: prompt ids restored from the prefix cache. started: when the request
    first had slots, by time.monotonic.
    pooler, encoded: where an embedding is asked for, the hidden states so far and the result.
    """

    id: str
    ids: Sequence[int]
    first_index: int
    prefill_stop: int
    params: SamplingParams
    seed: int
    constraints: "TokenConstraints"
    client: Client = DEFAULT_CLIENT
    priority: int = 0
    is_preempted: bool = False
    context_schedule: ContextSchedule = field(default_factory=ExactSchedule)
    status: RequestStatus = RequestStatus.WAITING
    choices: list[Choice] = field(default_factory=list)
    prefill_spans: deque[PrefillSpan] = field(default_factory=deque)
    num_prefilled: int = 0
    start: SessionState | None = None
    turn_ids: tuple[int, ...] = ()
    replayed: tuple[int, ...] = ()
    cached_prompt: CachedPrompt | None = None
    is_held: bool = False
    num_left_of_followers: int | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    num_cached: int = 0
    started: float | None = None
    pooler: "Pooler | None" = None
    encoded: Encoded | None = None

    @classmethod
    def new(
        cls,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        tokenizer: BaseTokenizer,
        constraints: "TokenConstraints",
        start: SessionState | None = None,
        context_schedule: ContextSchedule | None = None,
        grammar: "Grammar | None" = None,
        replayed: Sequence[int] = (),
    ) -> "Request":
        """A waiting request; its seed is random where `params` has none.

        grammar: of its structured output; each choice gets a matcher of it. replayed: of a
        session's turn, fewer than `max_tokens`.
        """
        session, new_ids = start or SessionState(), tuple(prompt_ids)
        past, fed = session.past, session.pending + new_ids
        if start is not None and not params.max_tokens:
            # a session's last id is never in its rows, and without a new id no recipe is followed:
            # the ids of a context that ends before the last id may not all be there
            has_no_rows = session.position > 0 and not session.rows
            fed = () if has_no_rows and not new_ids else fed[:-1]
        seed = secrets.randbits(63) if params.seed is None else params.seed
        again = tuple(replayed)
        request = cls(
            request_id,
            past + new_ids + again,
            first_index=session.num_tokens - len(past),
            prefill_stop=session.position + len(fed) + len(again),
            params=params,
            seed=seed,
            constraints=constraints,
            context_schedule=context_schedule or ExactSchedule(),
            start=start,
            turn_ids=new_ids,
            replayed=again,
        )
        request._plan_prefill(session.position)
        request._add_choices(tokenizer, fed, session)
        if grammar is not None:
            for choice in request.choices:
                choice.matcher = grammar.matcher()
        return request

    def _plan_prefill(self, num_held: int) -> None:
        """Set the spans that follow a state of `num_held` ids."""
        is_scored = self.params.prompt_logprobs is not None or self.params.encode is not None
        spans = prefill_spans(
            self.context_schedule,
            num_held,
            self.prefill_stop,
            self.last_index,
            is_scored=is_scored,
        )
        assert all(span.begin >= self.first_index for span in spans), "ids are missing"
        self.set_prefill_spans(spans)

    def _add_choices(
        self, tokenizer: BaseTokenizer, fed: Sequence[int], session: SessionState
    ) -> None:
        params = self.params
        table = tokenizer.token_bytes if params.skip_special_tokens else tokenizer.written_bytes
        undecoded = b"" if self.turn_ids else session.undecoded
        for index in range(params.n):
            text = Detokenizer(table, () if params.min_tokens else params.stop, undecoded)
            known = self.ids[: len(self.ids) - len(self.replayed)]
            history = TokenHistory(params, fed, self.constraints, session.counts, known)
            stop = self.prefill_stop
            context = self.context_schedule.start(max(stop - 1, 0))
            self.choices.append(Choice(self, index, text, history, stop, stop, context))

    def set_status(self, status: RequestStatus) -> None:
        """Change the status. Called by RequestManager alone."""
        assert status in _NEXT_STATUSES[self.status], (
            f"request {self.id} cannot go from {self.status.name} to {status.name}"
        )
        self.status = status

    def enable_prefix_reuse(self, use: CacheUse) -> None:
        """Use the prefix cache, unless every prompt id has to be computed."""
        params = self.params
        if self.start is None and params.prompt_logprobs is None and params.encode is None:
            self.cached_prompt = CachedPrompt.of(use, self.context_schedule.name, self.ids)

    @property
    def keeps_answer(self) -> bool:
        """Whether the state at the end of its only choice is cached."""
        prompt = self.cached_prompt
        return prompt is not None and prompt.use.writes and self.params.n == 1

    @property
    def next_stop(self) -> int:
        """Where the prefill of the first span stops at the latest."""
        span, prompt = self.prefill_spans[0], self.cached_prompt
        return span.stop if prompt is None else prompt.next_stop(span, self.num_prefilled)

    @property
    def last_index(self) -> int:
        """Index of the last id that may be fed: the last sampled id never is."""
        return self.prefill_stop - len(self.replayed) + self.params.max_tokens - 2

    @property
    def continues_session_rows(self) -> bool:
        """Whether prefill goes on from the session's rows, and not from an empty state."""
        return bool(self.prefill_spans) and self.prefill_spans[-1].begin > (
            self.prefill_spans[-1].start
        )

    @property
    def is_prefilled(self) -> bool:
        """Whether nothing is left to prefill."""
        return not self.prefill_spans

    @property
    def num_left(self) -> int:
        """Ids that are still to be prefilled; another thread may ask."""
        spans = list(self.prefill_spans)
        num = sum(span.stop - span.begin for span in spans)
        return num - (self.num_prefilled - spans[0].begin) if spans else 0

    def set_prefill_spans(self, spans: deque[PrefillSpan]) -> None:
        """Replace what is still to be prefilled."""
        self.prefill_spans = spans
        self.num_prefilled = spans[0].begin if spans else self.prefill_stop

    def advance_prefill(self, stop: int) -> None:
        """Note that the first span has been prefilled up to index `stop`."""
        self.num_prefilled = stop
        if stop == self.prefill_spans[0].stop:
            self.prefill_spans.popleft()
            self.set_prefill_spans(self.prefill_spans)

    def ids_at(self, start: int, stop: int) -> Sequence[int]:
        """Ids at indices start:stop, as far as there are any."""
        return self.ids[start - self.first_index : stop - self.first_index]

    @property
    def num_slots(self) -> int:
        """That it has or needs: one for each unfinished choice."""
        return len(self.unfinished_choices)

    @property
    def unfinished_choices(self) -> list[Choice]:
        """Choices that have not ended."""
        return [choice for choice in self.choices if choice.finish_reason is None]

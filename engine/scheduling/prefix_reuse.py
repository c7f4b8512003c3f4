"""Reuse of what prompts have in common: states between the pool and the prefix cache.

A prompt begins with the longest prefix whose state is known. Where it parts from a known prompt
later than that, its prefill stops there and the state is kept for the next. A prompt that begins
like one that is being prefilled waits until that one is where they part, and begins there.
"""

from collections import deque
from dataclasses import dataclass, replace

from cottention.engine.scheduling.batch import PrefillChunk
from cottention.engine.scheduling.prefill_stops import BLOCK, MIN_GAIN, CachedPrompt
from cottention.engine.scheduling.request import Choice, Request, RequestStatus
from cottention.engine.state.context_window import PrefillSpan
from cottention.engine.state.pool import StatePool
from cottention.engine.state.prefix_cache import ID_BYTES, PrefixCache, num_common, packed


@dataclass(frozen=True, slots=True)
class Hold:
    """What a request waits for: that another's prefill in the context `start` is at `index`."""

    leader: Request
    start: int
    index: int

    @property
    def is_over(self) -> bool:
        """Whether it is, or never will be."""
        if self.leader.status is not RequestStatus.RUNNING:
            return True
        position = _position(self.leader, self.start)
        return position is None or position >= self.index


class PrefixReuse:
    """Does nothing for requests that do not use the cache. Called from the engine's thread."""

    def __init__(self, pool: StatePool, cache: PrefixCache) -> None:
        self._pool = pool
        self._cache = cache
        self._reading: list[Request] = []
        self._holds: dict[Request, Hold] = {}

    def start(self, request: Request) -> None:
        """Restore the longest known prefix of a request that has just been given its slots.

        If an earlier one's prefill will soon know more, the request is held until `release`.
        """
        prompt = request.cached_prompt
        if prompt is None:
            return
        if prompt.use.reads:
            self._cache.num_queried += len(request.ids)
        self._reading.append(request)
        self._restore(request, prompt)

    def release(self) -> None:
        """Let the held requests go on whose reason to wait is over. Called before each step."""
        if not self._reading:
            return
        self._reading = [each for each in self._reading if _is_prefilling(each)]
        for request, hold in [*self._holds.items()]:
            if not _is_prefilling(request):  # it has ended, or gave up its slots: it goes on alone
                self._end_hold(request)
            elif hold.is_over:
                self._end_hold(request)
                self._restore(request, _prompt_of(request))

    def save_after_chunk(self, chunk: PrefillChunk) -> None:
        """Keep the state after a prefilled chunk, at a planned stop and at the end of a span."""
        request, span, stop = chunk.request, chunk.span, chunk.stop
        prompt = request.cached_prompt
        if prompt is None or not prompt.use.writes:
            return
        stops = prompt.stops.get(span.start, {})
        if stop == span.stop or stop in stops:
            tree, ids = prompt.tree(span.start), prompt.ids_from(span.start, stop)
            is_lasting = stop == span.stop or stops[stop]
            self._cache.put(tree, ids, lambda: self._pool.read(chunk.row), is_lasting=is_lasting)

    def save_at_end(self, choice: Choice) -> None:
        """Keep the state of a choice that has ended by itself and still has its slot.

        A step that is under way has put its last id into it.
        """
        request = choice.request
        prompt, num_fed = request.cached_prompt, choice.num_fed - request.prefill_stop
        if prompt is None or not request.keeps_answer or num_fed > len(choice.generated_ids):
            return
        start = request.context_schedule.start(choice.num_fed - 1)
        ids = (prompt.ids + packed(choice.generated_ids[:num_fed]))[ID_BYTES * start :]
        self._cache.put(
            prompt.tree(start), ids, lambda: self._pool.read(choice.row), is_lasting=True
        )

    def _restore(self, request: Request, prompt: CachedPrompt) -> None:
        """Begin each span after its longest known prefix, and plan where it stops.

        Where another's prefill will know more than the cache does, the request is held.
        """
        others = self._others(request, prompt) if prompt.use.reads else []
        spans: deque[PrefillSpan] = deque()
        for span in request.prefill_spans:
            begin = known = span.begin
            if prompt.use.reads:
                ids = prompt.ids_from(span.start, span.stop)
                match = self._cache.match(prompt.tree(span.start), ids)
                shared = max((_shared(prompt, span, each) for each in others), default=0)
                known = span.start + max(match.num_known, shared)
                if match.hit is not None and span.start + match.hit.length > begin:
                    begin = span.start + match.hit.length
                    self._pool.write(_row(request, span), match.hit.rows)
            prompt.plan(span, begin, known)
            spans.append(replace(span, begin=begin))
        num_cached = spans[-1].begin - spans[-1].start
        self._cache.num_hit += num_cached - request.num_cached
        request.num_cached = num_cached
        request.set_prefill_spans(spans)
        self._follow(request, prompt, others)

    def _follow(self, request: Request, prompt: CachedPrompt, others: list[Request]) -> None:
        """Hold the request if another is about to read much of what it would read."""
        main = request.prefill_spans[-1]
        ahead = {
            each: index
            for each in others
            if (index := _meeting(prompt, main, each)) - main.begin >= BLOCK
        }
        if not ahead:
            return
        leader = max(ahead, key=lambda each: ahead[each])
        for span in request.prefill_spans:
            index = _meeting(prompt, span, leader)
            if index - span.begin >= MIN_GAIN:
                _prompt_of(leader).add_stop(span.start, index)
        request.is_held = True
        self._holds[request] = Hold(leader, main.start, ahead[leader])
        self._note_followers(leader)

    def _others(self, request: Request, prompt: CachedPrompt) -> list[Request]:
        """Earlier requests of the scope that are being prefilled and keep states.

        A request never waits for a later one, so that none wait for each other.
        """
        found = []
        for each in self._reading:
            if each is request:
                break
            other = _prompt_of(each)
            if other.use.writes and other.scope == prompt.scope and _is_prefilling(each):
                found.append(each)
        return found

    def _end_hold(self, request: Request) -> None:
        request.is_held = False
        self._note_followers(self._holds.pop(request).leader)

    def _note_followers(self, leader: Request) -> None:
        """Tell the scheduler how short the shortest prompt is that waits for this one."""
        left = (_num_left(each) for each, hold in self._holds.items() if hold.leader is leader)
        leader.num_left_of_followers = min(left, default=None)


def _is_prefilling(request: Request) -> bool:
    return request.status is RequestStatus.RUNNING and not request.is_prefilled


def _num_left(request: Request) -> int:
    return request.prefill_stop - request.num_prefilled


def _row(request: Request, span: PrefillSpan) -> int:
    first = request.choices[0]
    return first.spare_row if span.is_spare else first.row


def _prompt_of(request: Request) -> CachedPrompt:
    assert request.cached_prompt is not None
    return request.cached_prompt


def _shared(prompt: CachedPrompt, span: PrefillSpan, other: Request) -> int:
    """How many ids of a span another prompt has in common, if it has a span of that context."""
    known = _prompt_of(other)
    if span.start not in known.stops:
        return 0
    return num_common(prompt.ids_from(span.start, span.stop), known.ids_from(span.start))


def _meeting(prompt: CachedPrompt, span: PrefillSpan, other: Request) -> int:
    """Index of the last state in another's prefill that a span can begin with; -1 if it is past."""
    position = _position(other, span.start)
    if position is None:
        return -1
    index = min(span.start + _shared(prompt, span, other), span.stop - 1)
    return index if position < index else -1


def _position(request: Request, start: int) -> int | None:
    """Up to which index the context `start` is prefilled; None if nothing of it is left to do."""
    for place, span in enumerate(request.prefill_spans):
        if span.start == start:
            return request.num_prefilled if place == 0 else span.begin
    return None

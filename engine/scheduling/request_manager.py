"""Every request between its submission and its last output.

Owns who is alive, who holds which slots, and what a new id means for its choice: more text, or the
end. Called from the engine's thread alone. Knows no model and no queue of commands.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cottention.engine.errors import ParameterError
from cottention.engine.outputs import FinishReason, Output, TokenLogprob
from cottention.engine.scheduling.batch import Batch, Sample
from cottention.engine.scheduling.preemption import Preemption
from cottention.engine.scheduling.prefix_reuse import PrefixReuse
from cottention.engine.scheduling.request import Choice, Request, num_cached_of, scores_of
from cottention.engine.scheduling.scheduler import Scheduler
from cottention.engine.state.pool import StatePool
from cottention.engine.state.session_state import SessionState


class RequestManager:
    """Keeps requests, scheduler and pool in step with each other, and counts."""

    def __init__(
        self,
        scheduler: Scheduler,
        pool: StatePool,
        pausing: Preemption,
        warm: PrefixReuse,
        window: int,
    ) -> None:
        """`window`: how many of its last ids a session keeps."""
        self._scheduler = scheduler
        self._pool = pool
        self._warm = warm
        self._pausing = pausing
        self._window = window
        self._requests: dict[str, Request] = {}
        self._taken_ids: set[str] = set()
        self.num_finished: Counter[FinishReason] = Counter()
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0

    def take_id(self, request_id: str) -> None:
        """Keep an id for a request until its last output; under the engine's lock, from any thread.

        Raises ParameterError where a request of that id is alive.
        """
        if request_id in self._taken_ids:
            raise ParameterError("request_id", "there is an unfinished request of that request_id")
        self._taken_ids.add(request_id)

    def add(self, request: Request) -> list[Output]:
        """Put a new request in line."""
        self._requests[request.id] = request
        if not request.reads:  # a session whose one id waits for the next turn
            return self.end(request, FinishReason.LENGTH)
        self._scheduler.add(request)
        return []

    def admit(self) -> None:
        """Give slots to those who may start."""
        for request in self._scheduler.admit(self._pool.num_free):
            if self._pausing.begin(request):
                continue
            if request.start is not None and request.goes_on:
                self._pool.write(request.choices[0].row, request.start.rows)
            self._warm.begin(request)

    def move_on(
        self, plan: Batch, scores: Mapping[Request, Sequence[TokenLogprob]]
    ) -> list[Output]:
        """Note what a finished step has put into the states; requests without text end here."""
        for choice in plan.decode:
            self._warm.before_token(choice)
            choice.position += len(choice.pending)
            choice.pending = []
        for request, new in scores.items():
            request.scores += new
        outputs = []
        for chunk in plan.prefill:
            self.num_prompt_tokens += chunk.stop - chunk.start
            self._warm.after_chunk(chunk)
            chunk.request.has_read(chunk.stop)
            if chunk.is_last and chunk.request.params.max_tokens == 0:
                outputs += self.end(chunk.request, FinishReason.LENGTH)
            elif chunk.is_last:
                self._scheduler.start_choices(chunk.request)
        return outputs

    def accept(self, sample: Sample) -> Output:
        """Take a new id into its choice: text, and whether this is the end."""
        choice, (token_id, logprob) = sample
        request, params = choice.request, choice.request.params
        choice.note(token_id)
        self.num_generated_tokens += 1
        is_end = token_id in request.end_ids
        is_written = not is_end or params.include_stop_str_in_output
        text = choice.detokenizer.push(token_id) if is_written else ""
        reason, state = _reason(choice, is_end), None
        if reason is not None:
            text += self._last_text(choice)
            reason = _reason(choice, is_end) or reason  # the last text may complete a stop string
            state = self._kept(choice)
            self._warm.at_end(choice)
            self._scheduler.remove_choice(choice)
            self._finish(choice, reason)
        told = request.id, choice.index, text, (token_id,), reason
        return Output(
            *told,
            stop_reason=_stop_reason(choice, token_id),
            logprobs=() if logprob is None else (logprob,),
            prompt_logprobs=scores_of(choice) if choice.num_generated == 1 else None,
            state=state,
            num_cached=0 if reason is None else num_cached_of(choice),
            context_start=choice.context_start,
            started=request.started,
        )

    def pause(self, request_id: str) -> list[Output]:
        """Generate no more of a request, if it is still alive; those without room for it end."""
        request = self._requests.get(request_id)
        ended = self._pausing.pause(request) if request else []
        return [out for each in ended for out in self.end(each, FinishReason.UNREAD)]

    def resume(self, request_id: str) -> list[Output]:
        """Go on with a request that pauses, if it is still alive."""
        if request := self._requests.get(request_id):
            self._pausing.resume(request)
        return []

    def cancel(
        self, request_id: str, reason: FinishReason = FinishReason.CANCELLED
    ) -> list[Output]:
        """End a request, if it is still alive."""
        request = self._requests.get(request_id)
        return self.end(request, reason) if request else []

    def cancel_all(self) -> list[Output]:
        """End everybody."""
        return [out for request_id in list(self._requests) for out in self.cancel(request_id)]

    def end(self, request: Request, reason: FinishReason, error: str | None = None) -> list[Output]:
        """End what is unfinished of a request; text held back comes out, but for a fault."""
        self._scheduler.remove_request(request)
        outputs = []
        for choice in request.unfinished:
            text = "" if reason is FinishReason.ERROR else self._last_text(choice)
            state = self._kept(choice) if reason is FinishReason.LENGTH else None
            self._finish(choice, reason)
            scores = None if choice.num_generated else scores_of(choice)
            out = Output(request.id, choice.index, text, (), reason, error, prompt_logprobs=scores)
            out = replace(out, num_cached=num_cached_of(choice), context_start=choice.context_start)
            outputs.append(replace(out, state=state, started=request.started))
        return outputs

    def _kept(self, choice: Choice) -> SessionState | None:
        """The session after its turn; None for a request without one. Before its slot is freed."""
        start, request = choice.request.start, choice.request
        if start is None:
            return None
        undecoded = choice.detokenizer.undecoded
        after = start.extended(request.turn_ids, choice.drawn, self._window, undecoded)
        return after.fed(self._pool.read(choice.row), choice.position) if request.slots else after

    @staticmethod
    def _last_text(choice: Choice) -> str:
        """What was held back, and the stop string where it is wanted."""
        end = (
            choice.detokenizer.finish if choice.request.start is None else choice.detokenizer.pause
        )
        text = end()
        wants_stop = choice.request.params.include_stop_str_in_output
        return text + (choice.detokenizer.stop or "") if wants_stop else text

    def _finish(self, choice: Choice, reason: FinishReason) -> None:
        """Free the choice's slot; with its last choice a request is forgotten."""
        choice.finish_reason = reason
        self.num_finished[reason] += 1
        if choice.request.slots:
            self._pool.free(choice.request.slots[choice.index])
        if not choice.request.unfinished:
            self._pausing.forget(choice.request)
            del self._requests[choice.request.id]
            self._taken_ids.remove(choice.request.id)


def _reason(choice: Choice, is_end: bool) -> FinishReason | None:
    if is_end or choice.detokenizer.stop is not None:
        return FinishReason.STOP
    return FinishReason.LENGTH if choice.num_generated == choice.request.params.max_tokens else None


def _stop_reason(choice: Choice, token_id: int) -> str | int | None:
    """The stop string or stop id, where one of the request's own ended the choice."""
    if choice.detokenizer.stop is not None:
        return choice.detokenizer.stop
    return token_id if token_id in choice.request.params.stop_token_ids else None

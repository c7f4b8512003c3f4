"""Every request between its submission and its last output.

Owns who is alive, who holds which slots, and what a new id means for its choice: more text, or the
end. Called from the engine's thread alone. Knows no model and no queue of commands.
"""

from collections import Counter

from engine.outputs import FinishReason, Output
from engine.request import Choice, Request
from engine.runner import Sample
from engine.scheduler import Plan, Scheduler
from engine.state import StatePool


class Registry:
    """Keeps requests, scheduler and pool in step with each other, and counts."""

    def __init__(
        self, scheduler: Scheduler, pool: StatePool, eos_token_ids: tuple[int, ...]
    ) -> None:
        self._scheduler = scheduler
        self._pool = pool
        self._eos_token_ids = frozenset(eos_token_ids)
        self._requests: dict[str, Request] = {}
        self.num_finished: Counter[FinishReason] = Counter()
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0

    def add(self, request: Request) -> list[Output]:
        """Put a new request in line."""
        self._requests[request.id] = request
        self._scheduler.add(request)
        return []

    def admit(self) -> None:
        """Give slots to those who may start."""
        for request in self._scheduler.admit(self._pool.num_free):
            request.slots = [self._pool.allocate() for _ in request.choices]

    def move_on(self, plan: Plan) -> None:
        """Note what a finished step has put into the states."""
        for choice in plan.decode:
            choice.position += len(choice.pending)
            choice.pending = []
        for chunk in plan.prefill:
            self.num_prompt_tokens += chunk.stop - chunk.start
            chunk.request.num_prefilled = chunk.stop
            if chunk.is_last:
                self._scheduler.start_choices(chunk.request)

    def accept(self, sample: Sample) -> Output:
        """Take a new id into its choice: text, and whether this is the end."""
        choice, token_id = sample
        choice.pending.append(token_id)
        choice.num_generated += 1
        self.num_generated_tokens += 1
        is_end = self._is_end(choice, token_id)
        text = "" if is_end else choice.detokenizer.push(token_id)
        reason = _reason(choice, is_end)
        if reason is not None:
            text += choice.detokenizer.finish()
            self._scheduler.remove_choice(choice)
            self._finish(choice, reason)
        return Output(choice.request.id, choice.index, text, (token_id,), reason)

    def cancel(self, request_id: str) -> list[Output]:
        """End a request, if it is still alive."""
        request = self._requests.get(request_id)
        return self.end(request, FinishReason.CANCELLED) if request else []

    def cancel_all(self) -> list[Output]:
        """End everybody."""
        return [out for request_id in list(self._requests) for out in self.cancel(request_id)]

    def end(self, request: Request, reason: FinishReason, error: str | None = None) -> list[Output]:
        """End what is unfinished of a request, wherever it is; text held back comes out."""
        self._scheduler.remove_request(request)
        outputs = []
        for choice in request.unfinished:
            text = choice.detokenizer.finish()
            self._finish(choice, reason)
            outputs.append(Output(request.id, choice.index, text, (), reason, error))
        return outputs

    def _is_end(self, choice: Choice, token_id: int) -> bool:
        return token_id in self._eos_token_ids and not choice.request.params.ignore_eos

    def _finish(self, choice: Choice, reason: FinishReason) -> None:
        """Free the choice's slot; with its last choice a request is forgotten."""
        choice.finish_reason = reason
        self.num_finished[reason] += 1
        if choice.request.slots:
            self._pool.free(choice.slot)
        if not choice.request.unfinished:
            del self._requests[choice.request.id]


def _reason(choice: Choice, is_end: bool) -> FinishReason | None:
    if is_end or choice.detokenizer.stopped:
        return FinishReason.STOP
    return FinishReason.LENGTH if choice.num_generated == choice.request.params.max_tokens else None

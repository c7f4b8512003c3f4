"""Every unfinished request: its status, its slots, and what a step changes in it."""

import time
from collections import Counter
from dataclasses import replace

from cottention.engine.encoding import Encoded
from cottention.engine.errors import ParameterError
from cottention.engine.outputs import FinishReason, Output, TokenLogprob
from cottention.engine.scheduling.batch import Batch, BatchResult
from cottention.engine.scheduling.output_processor import OutputProcessor
from cottention.engine.scheduling.preemption import Preemption
from cottention.engine.scheduling.prefix_reuse import PrefixReuse
from cottention.engine.scheduling.request import Choice, Request, RequestStatus
from cottention.engine.scheduling.scheduler import Scheduler
from cottention.engine.state.pool import StatePool


class RequestManager:
    """The only one that changes a request's status; keeps scheduler and pool consistent with it.

    All methods but `reserve_id` are called from the engine's thread.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pool: StatePool,
        preemption: Preemption,
        prefix_reuse: PrefixReuse,
        output_processor: OutputProcessor,
    ) -> None:
        self._scheduler = scheduler
        self._pool = pool
        self._preemption = preemption
        self._prefix_reuse = prefix_reuse
        self._output_processor = output_processor
        self._requests: dict[str, Request] = {}
        self._reserved_ids: set[str] = set()
        self.num_finished: Counter[FinishReason] = Counter()
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0

    def reserve_id(self, request_id: str) -> None:
        """Reserve an id until its request's last output; from any thread, under the engine's lock.

        Raises ParameterError where an unfinished request has that id.
        """
        if request_id in self._reserved_ids:
            raise ParameterError("request_id", "there is an unfinished request of that request_id")
        self._reserved_ids.add(request_id)

    @property
    def num_to_prefill(self) -> int:
        """Ids of all requests that are still to be prefilled; another thread may ask."""
        return sum(request.num_left for request in list(self._requests.values()))

    def add(self, request: Request) -> list[Output]:
        """Queue a new request."""
        self._requests[request.id] = request
        if request.is_prefilled:  # a session's only id stays pending: there is nothing to compute
            return self.finish(request, FinishReason.LENGTH)
        self._scheduler.add(request)
        if request.replayed:
            [choice] = request.choices
            return [self._output_processor.replay(choice, request.replayed)]
        return []

    def admit(self) -> None:
        """Start waiting requests for which there are slots, each where it has to go on.

        Those that waited for another's prefill go on as well.
        """
        self._prefix_reuse.release()
        preempted, admitted = self._scheduler.admit(self._pool.num_free)
        for request in preempted:
            self._preemption.park(request)
            request.set_status(RequestStatus.WAITING)
            self.num_preemptions += 1
        for request in admitted:
            request.set_status(RequestStatus.RUNNING)
            for choice in request.unfinished_choices:
                choice.slot = self._pool.allocate()
                choice.rows = self._pool.rows_of(choice.slot)
            if self._preemption.resume(request):
                if request.is_prefilled:
                    self._scheduler.start_decoding(request)
                continue
            request.started = time.monotonic()
            if request.start is not None and request.continues_session_rows:
                self._pool.write(request.choices[0].row, request.start.rows)
            self._prefix_reuse.start(request)

    def advance(self, batch: Batch, result: BatchResult) -> list[Output]:
        """Note what a step has put into the states; requests that generate nothing end here."""
        for choice in batch.decode:
            choice.position += 1
            choice.pending = []
        for choice in batch.late:
            choice.late_logits = None
        for choice, logits in result.late_logits.items():
            choice.late_logits = logits
            self._scheduler.hold(choice)
        for request, logprobs in result.prompt_logprobs.items():
            request.prompt_logprobs += logprobs
        for request, embedding in result.embeddings.items():
            request.encoded = Encoded(embedding=embedding)
        outputs = []
        for chunk in batch.prefill:
            request = chunk.request
            self.num_prompt_tokens += chunk.stop - chunk.start
            self._prefix_reuse.save_after_chunk(chunk)
            request.advance_prefill(chunk.stop)
            if chunk.is_last and request.params.max_tokens == 0:
                outputs += self.finish(request, FinishReason.LENGTH)
            elif chunk.is_last:
                self._scheduler.start_decoding(request)
        return outputs

    def append_token(
        self, choice: Choice, token_id: int, logprob: TokenLogprob | None = None
    ) -> Output:
        """Append a sampled id to its choice, which may end with it."""
        choice.append_token(token_id)
        self.num_generated_tokens += 1
        output = self._output_processor.process(choice, token_id, logprob)
        reason = output.finish_reason
        if reason is not None:
            output = self._with_rows(output, choice)
            self._prefix_reuse.save_at_end(choice)
            self._scheduler.remove_choice(choice)
            self._finish_choice(choice, reason)
        return output

    def pause(self, request_id: str) -> list[Output]:
        """Park a request's states, if there is such a request and its prompt is prefilled.

        Until then there is no output that its reader could be behind with. Where too many states
        would be parked, requests end with SLOW_READER; the outputs are theirs.
        """
        request = self._requests.get(request_id)
        if request is None or request.status is RequestStatus.PAUSED or not request.is_prefilled:
            return []
        victims = self._preemption.victims(request)
        outputs = [out for each in victims for out in self.finish(each, FinishReason.SLOW_READER)]
        if request not in victims:
            self._scheduler.remove_request(request)
            self._preemption.park(request)
            request.set_status(RequestStatus.PAUSED)
        return outputs

    def resume(self, request_id: str) -> list[Output]:
        """Let a paused request wait for slots, if there is such a request."""
        request = self._requests.get(request_id)
        if request is not None and request.status is RequestStatus.PAUSED:
            request.set_status(RequestStatus.WAITING)
            self._scheduler.add_resumed(request)
        return []

    def cancel(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> list[Output]:
        """End a request, if there is such a request."""
        request = self._requests.get(request_id)
        return self.finish(request, reason) if request else []

    def cancel_all(self) -> list[Output]:
        """End every request."""
        return [out for request_id in list(self._requests) for out in self.cancel(request_id)]

    def finish(
        self, request: Request, reason: FinishReason, error: str | None = None
    ) -> list[Output]:
        """End the unfinished choices of a request."""
        self._scheduler.remove_request(request)
        outputs = []
        for choice in request.unfinished_choices:
            output = self._output_processor.finish(choice, reason, error)
            outputs.append(self._with_rows(output, choice))
            self._finish_choice(choice, reason)
        return outputs

    def _with_rows(self, output: Output, choice: Choice) -> Output:
        """The output with the pool's rows in its session state, if it has one.

        A session's last id is never in its rows, as it is here before a late sample.
        """
        if output.state is None or choice.slot is None or choice.late_logits is not None:
            return output
        rows = self._pool.read(choice.row)
        return replace(output, state=output.state.fed(rows, choice.position))

    def _finish_choice(self, choice: Choice, reason: FinishReason) -> None:
        """Free the choice's slot; the request is finished with its last choice."""
        if choice.matcher is not None:
            choice.matcher.close()
        choice.finish_reason, choice.matcher, choice.late_logits = reason, None, None
        self.num_finished[reason] += 1
        if choice.slot is not None:
            self._pool.free(choice.slot)
            choice.slot = None
        request = choice.request
        if not request.unfinished_choices:
            request.set_status(RequestStatus.FINISHED)
            self._preemption.discard(request)
            del self._requests[request.id]
            self._reserved_ids.remove(request.id)

"""Dispatches the engine's outputs to streams, and measures the latency of each prompt.

The dispatcher knows every prompt in progress: it takes it out of the admission queue at its first
output, pauses it while its stream is full, and cancels it when its deadline passes or its stream
is closed. It runs on the event loop; `Handover` brings it what the engine's thread makes.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cottention.engine.outputs import FinishReason, Output
from cottention.server.generation.admission import AdmissionQueue
from cottention.server.generation.latency import LatencyStats
from cottention.server.generation.output_stream import OutputStream
from cottention.server.generation.request import GenerationRequest

logger = logging.getLogger("cottention")

Step = tuple[Sequence[Output], float]
"""Outputs of a step, and when it ended, by the dispatcher's clock."""

HOLD_SECONDS = 0.004
"""How long an output waits for others at most, on a loop that has time."""

GIVE_WAY_SECONDS = 0.00001
"""Sleep of the engine's thread after the first output of a prompt: without it the loop gets neither
interpreter nor core before the next step is over.
"""

SERVED = (None, FinishReason.STOP, FinishReason.LENGTH)
"""Finish reasons of a first output whose prompt has been prefilled."""


class EngineControl(Protocol):
    """Operations on a submitted engine request."""

    def cancel(self, request_id: str, reason: FinishReason = ...) -> None: ...
    def pause(self, request_id: str) -> None: ...
    def resume(self, request_id: str) -> None: ...


@dataclass(slots=True)
class PromptState:
    """A prompt in progress. Times are in seconds, by the dispatcher's clock.

    first_choice: number of its first choice in the stream. num_reread: GenerationRequest's.
    last_token_at: time of the latest token of each choice.
    """

    stream: OutputStream
    first_choice: int
    num_prompt_tokens: int
    owner: str
    num_unfinished: int
    arrived_at: float
    num_reread: int = 0
    is_queued: bool = True
    num_generated: int = 0
    first_token_at: float | None = None
    started_at: float | None = None
    last_token_at: dict[int, float] = field(default_factory=dict)

    @property
    def num_read_tokens(self) -> int:
        """Tokens that it has in the admission queue."""
        return self.num_prompt_tokens + self.num_reread


class OutputDispatcher:
    """Streams and prompts in progress of one engine."""

    def __init__(
        self, control: EngineControl, admission_queue: AdmissionQueue, clock: Callable[[], float]
    ) -> None:
        """clock: the one that the times of steps come from."""
        self.latency = LatencyStats()
        self._control = control
        self._admission_queue = admission_queue
        self._clock = clock
        self._streams: dict[OutputStream, Sequence[str]] = {}
        self._prompts: dict[str, PromptState] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def streams(self) -> list[OutputStream]:
        """Streams that are not closed."""
        return list(self._streams)

    @property
    def num_prompts(self) -> int:
        """Prompts whose stream is not closed."""
        return len(self._prompts)

    def open_stream(
        self,
        request_ids: Sequence[str],
        request: GenerationRequest,
        *,
        keeps_token_ids: bool,
        max_unread_bytes: int | None,
        deadline: float | None,
        owner: str = "",
        keeps_apart: bool = False,
    ) -> OutputStream:
        """Put a request's prompts into the admission queue, and open the stream of their outputs.

        request_ids: the engine's ids of the prompts. max_unread_bytes: None for no limit.
        deadline: by the event loop's clock. owner: of the request's key, with whose prompts it
        waits in the queue. keeps_apart: as OutputStream has it. Raises ApiError (queue full).
        """
        self._admission_queue.enter(len(request_ids), request.num_read_tokens, owner)
        n = request.params.n
        stream = OutputStream(
            len(request_ids) * n,
            self._on_close,
            self._on_take,
            keeps_token_ids=keeps_token_ids,
            max_unread_bytes=max_unread_bytes,
            keeps_apart=keeps_apart,
        )
        self._streams[stream] = request_ids
        self._idle.clear()
        now = self._clock()
        for place, request_id in enumerate(request_ids):
            num_tokens = len(request.prompts[place])
            self._prompts[request_id] = PromptState(
                stream, place * n, num_tokens, owner, n, now, request.num_reread
            )
        if deadline is not None:
            stream.timer = asyncio.get_running_loop().call_at(deadline, self._on_deadline, stream)
        return stream

    def cancel(self, stream: OutputStream) -> None:
        """Cancel a stream's prompts by its client's wish; it gets the final outputs."""
        if stream in self._streams:
            stream.was_cancelled = True
            self._cancel(stream, FinishReason.ABORT)

    def cancel_all(self) -> None:
        """Cancel all prompts; their streams get the final outputs."""
        for stream in self._streams:
            self._cancel(stream, FinishReason.ABORT)

    async def wait_idle(self) -> None:
        """Return when every stream is closed."""
        await self._idle.wait()

    def dispatch(self, steps: Iterable[Step]) -> None:
        """Pass the outputs of steps to their streams; each sends what it has at the end."""
        written: dict[OutputStream, None] = {}
        for outputs, now in steps:
            gaps: Counter[float] = Counter()
            for output in outputs:
                if output.finish_reason is FinishReason.ERROR:
                    logger.error("request %s failed: %s", output.request_id, output.error)
                if prompt := self._prompts.get(output.request_id):
                    self._measure(prompt, output, now, gaps)
                    if self._write(prompt, output):
                        written[prompt.stream] = None
                    else:
                        self._deliver(prompt, output)
            self.latency.observe_gaps(gaps)
        for stream in written:
            self._send(stream)

    def _measure(
        self, prompt: PromptState, output: Output, now: float, gaps: Counter[float]
    ) -> None:
        """Update the prompt's times; `gaps` counts tokens by the seconds since the one before."""
        if prompt.is_queued:
            prompt.is_queued = False
            was_served = output.finish_reason in SERVED
            self._admission_queue.leave(
                1, prompt.num_read_tokens, prompt.owner, was_served=was_served
            )
        if output.token_ids:
            prompt.num_generated += len(output.token_ids)
            prompt.stream.last_token = now
            before = prompt.last_token_at.get(output.choice)
            prompt.last_token_at[output.choice] = now
            if before is not None:
                gaps[now - before] += len(output.token_ids)
            elif prompt.first_token_at is None:
                prompt.first_token_at = now
                prompt.stream.first_token = prompt.stream.first_token or now
                self.latency.first_token.observe(now - prompt.arrived_at)
        if prompt.started_at is None:
            prompt.started_at = output.started
            prompt.stream.started = prompt.stream.started or output.started

    def _deliver(self, prompt: PromptState, output: Output) -> None:
        stream, request_id = prompt.stream, output.request_id
        stream.deliver(prompt.first_choice + output.choice, output)
        if output.finish_reason is not None:
            prompt.num_unfinished -= 1
            if prompt.num_unfinished == 0:
                self._observe_end(prompt)
        elif stream.is_full and request_id not in stream.paused:
            stream.paused.add(request_id)
            self._control.pause(request_id)

    @staticmethod
    def _write(prompt: PromptState, output: Output) -> bool:
        try:
            return prompt.stream.write(prompt.first_choice + output.choice, output)
        except Exception:  # of this one answer: the other streams of the step have theirs
            logger.exception("a part of an answer could not be made")
            prompt.stream.fail()
            return True

    @staticmethod
    def _send(stream: OutputStream) -> None:
        try:
            stream.send()
        except Exception:  # as above
            logger.exception("a part of an answer could not be written")
            stream.fail()

    def _observe_end(self, prompt: PromptState) -> None:
        self.latency.observe_end(
            num_prompt_tokens=prompt.num_prompt_tokens,
            num_generated=prompt.num_generated,
            arrived_at=prompt.arrived_at,
            started_at=prompt.started_at,
            first_token_at=prompt.first_token_at,
            ended_at=self._clock(),
        )

    def _on_take(self, stream: OutputStream) -> None:
        """The stream has been read: its paused prompts resume."""
        for request_id in stream.paused:
            self._control.resume(request_id)
        stream.paused.clear()

    def _on_deadline(self, stream: OutputStream) -> None:
        """Unfinished choices end with what they have."""
        self._cancel(stream, FinishReason.TIMEOUT)

    def _cancel(self, stream: OutputStream, reason: FinishReason) -> None:
        """Prompts that are still being submitted are cancelled then: see `cancel_reason`."""
        stream.cancel_reason = stream.cancel_reason or reason
        for request_id in self._streams[stream]:
            self._control.cancel(request_id, reason)

    def _on_close(self, stream: OutputStream) -> None:
        if stream.timer is not None:
            stream.timer.cancel()
        stream.cancel_reason = stream.cancel_reason or FinishReason.ABORT
        for request_id in self._streams.pop(stream):
            prompt = self._prompts.pop(request_id)
            if prompt.is_queued:
                self._admission_queue.leave(1, prompt.num_read_tokens, prompt.owner)
            if not stream.is_finished:
                self._control.cancel(request_id)
        if not self._streams:
            self._idle.set()


class Handover:
    """Steps on their way from the engine's thread to the event loop, several together.

    Waking the loop costs more than a step of a small model, in which both threads need the same
    cores and the interpreter. So where steps come fast, the loop looks by itself for what has come,
    and is woken only for what cannot wait: the first output of a prompt, the last of a choice.
    `post` is called by the engine's thread, all else by the loop.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, dispatch: Callable[[Sequence[Step]], None]
    ) -> None:
        """dispatch: takes steps in order."""
        self._loop = loop
        self._dispatch = dispatch
        self._steps: deque[Step] = deque()
        self._begun: set[str] = set()
        self._is_expected = False
        self._last_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def post(self, outputs: Sequence[Output]) -> None:
        """Leave the outputs of a step. Raises RuntimeError where the loop is closed."""
        is_first, is_last = self._note(outputs)
        self._steps.append((outputs, time.monotonic()))
        if is_first or is_last or not self._is_expected:
            self._is_expected = True
            self._loop.call_soon_threadsafe(self.dispatch)
        if is_first:
            time.sleep(GIVE_WAY_SECONDS)

    def _note(self, outputs: Sequence[Output]) -> tuple[bool, bool]:
        """Whether the first output of a prompt is among these, and the last of a choice."""
        is_first, is_last, begun = False, False, self._begun
        for output in outputs:
            if output.finish_reason is not None:
                begun.discard(output.request_id)
                is_last = True
            elif output.request_id not in begun:
                begun.add(output.request_id)
                is_first = True
        return is_first, is_last

    def dispatch(self) -> None:
        """Dispatch what there is, and look again soon where steps come fast."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._is_expected = False  # before looking: what is posted from now on wakes the loop
        steps = [self._steps.popleft() for _ in range(len(self._steps))]
        if not steps:
            return
        before = steps[-2][1] if len(steps) > 1 else self._last_at
        self._last_at = steps[-1][1]
        if self._last_at - before < HOLD_SECONDS / 2:
            self._is_expected = True
            self._timer = self._loop.call_later(HOLD_SECONDS, self.dispatch)
        self._dispatch(steps)

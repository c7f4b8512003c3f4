"""Which reading gets which output, and what each prompt's way through the engine took.

Owns the prompts that are alive, that they leave the line and pause or end when they should, and
what is timed of them. Lives on the event loop; knows no HTTP.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cottention.engine.outputs import FinishReason, Output
from cottention.server.generation.admission import AdmissionQueue
from cottention.server.generation.latency import LatencyStats
from cottention.server.generation.output_stream import OutputStream
from cottention.server.generation.request import GenerationRequest

logger = logging.getLogger("cottention")

SERVED = (None, FinishReason.STOP, FinishReason.LENGTH)
"""How a prompt's first output ends it, where the prompt has been read."""


class Control(Protocol):
    """What can be done to a request of the engine."""

    def cancel(self, request_id: str, reason: FinishReason = ...) -> None: ...
    def pause(self, request_id: str) -> None: ...
    def resume(self, request_id: str) -> None: ...


@dataclass(slots=True)
class Route:
    """One prompt: whose it is, the number of its first choice there, and when what happened.

    last: when each choice had its last token.
    """

    reading: OutputStream
    first: int
    num_prompt: int
    num_unfinished: int
    began: float
    waits: bool = True
    num_generated: int = 0
    first_token: float | None = None
    started: float | None = None
    last: dict[int, float] = field(default_factory=dict)


class OutputDispatcher:
    """Those of one engine."""

    def __init__(self, control: Control, line: AdmissionQueue, clock: Callable[[], float]) -> None:
        """clock: the one by which outputs are timed."""
        self.timings = LatencyStats()
        self._control = control
        self._line = line
        self._clock = clock
        self._parts: dict[OutputStream, Sequence[str]] = {}
        self._routes: dict[str, Route] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def readings(self) -> list[OutputStream]:
        """Those that are not closed."""
        return list(self._parts)

    def open(self, parts: Sequence[str], order: GenerationRequest, max_unread: int) -> OutputStream:
        """A reading of these prompts, which are in the line from now on. Raises ApiError."""
        self._line.enter(len(parts), order.num_prompt)
        n = order.params.n
        reading = OutputStream(
            len(parts) * n,
            self._close,
            self._go_on,
            keeps_tokens=order.needs_tokens,
            max_unread=max_unread if order.is_stream else None,
        )
        self._parts[reading] = parts
        self._idle.clear()
        now = self._clock()
        for place, part in enumerate(parts):
            num_prompt = len(order.prompts[place])
            self._routes[part] = Route(reading, place * n, num_prompt, n, now)
        if order.deadline is not None:
            loop = asyncio.get_running_loop()
            reading.timer = loop.call_at(order.deadline, self._expire, reading)
        return reading

    def cancel_all(self) -> None:
        """Cancel whatever runs; every reader gets its final pieces."""
        for part in self._routes:
            self._control.cancel(part)

    async def wait_idle(self) -> None:
        """Return when every reading is closed."""
        await self._idle.wait()

    def dispatch(self, outputs: Sequence[Output], now: float) -> None:
        """Hand on a step's outputs; `now` is when it ended."""
        gaps: Counter[float] = Counter()
        for output in outputs:
            if output.finish_reason is FinishReason.ERROR:
                logger.error("request %s failed: %s", output.request_id, output.error)
            if route := self._routes.get(output.request_id):
                self._note(route, output, now, gaps)
                self._hand_on(route, output)
        self.timings.note_gaps(gaps)

    def _note(self, route: Route, output: Output, now: float, gaps: Counter[float]) -> None:
        """What the output tells of its prompt's way."""
        if route.waits:
            route.waits = False
            was_served = output.finish_reason in SERVED
            self._line.leave(1, route.num_prompt, was_served=was_served)
        if output.token_ids:
            route.num_generated += len(output.token_ids)
            before = route.last.get(output.choice)
            route.last[output.choice] = now
            if before is not None:
                gaps[now - before] += len(output.token_ids)
            elif route.first_token is None:
                route.first_token = now
                route.reading.first_token = route.reading.first_token or now
                self.timings.first_token.observe(now - route.began)
        if route.started is None:
            route.started = output.started
            route.reading.started = route.reading.started or output.started

    def _hand_on(self, route: Route, output: Output) -> None:
        reading, part = route.reading, output.request_id
        reading.deliver(route.first + output.choice, output)
        if output.finish_reason is not None:
            route.num_unfinished -= 1
            if route.num_unfinished == 0:
                self._tell_timings(route)
        elif reading.is_full and part not in reading.paused:
            reading.paused.add(part)
            self._control.pause(part)

    def _tell_timings(self, route: Route) -> None:
        self.timings.note_end(
            num_prompt=route.num_prompt,
            num_generated=route.num_generated,
            began=route.began,
            started=route.started,
            first_token=route.first_token,
            ended=self._clock(),
        )

    def _go_on(self, reading: OutputStream) -> None:
        """It has been read."""
        for part in reading.paused:
            self._control.resume(part)
        reading.paused.clear()

    def _expire(self, reading: OutputStream) -> None:
        """What has not ended by now ends with what it has."""
        for part in self._parts[reading]:
            self._control.cancel(part, FinishReason.TIMEOUT)

    def _close(self, reading: OutputStream) -> None:
        if reading.timer is not None:
            reading.timer.cancel()
        for part in self._parts.pop(reading):
            route = self._routes.pop(part)
            if route.waits:
                self._line.leave(1, route.num_prompt)
            if not reading.is_finished:
                self._control.cancel(part)
        if not self._parts:
            self._idle.set()

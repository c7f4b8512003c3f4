"""Between the event loop and the engine's thread.

Owns which reading gets which output, whether new work is taken, and the one post per step from the
engine's thread to the loop. Everything here but `_deliver` and `_on_death` runs on the loop. Knows
no HTTP.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

from engine.errors import EngineStoppedError
from engine.outputs import EngineStats, FinishReason, Output
from server.admission import Line
from server.orders import QUICK_IDS, Order
from server.reading import Reading

if TYPE_CHECKING:  # the engine brings torch with it, which the server does not know
    from engine.engine import Engine
    from engine.worker import EngineWorker

logger = logging.getLogger("cottention")

Deliver = Callable[[list[Output]], None]
OnDeath = Callable[[BaseException], None]


SERVED = (None, FinishReason.STOP, FinishReason.LENGTH)
"""How a prompt's first output ends it, where the prompt has been read."""


class Phase(StrEnum):
    """The server's life; each value is how a client is told that it is so."""

    STARTING = "the server is starting"
    READY = "the server is ready"
    DRAINING = "the server is shutting down"
    FAILED = "the engine has stopped"


class Bridge:
    """Submits for readers, and hands each reader its pieces."""

    def __init__(
        self,
        engine: "Engine",
        make_worker: Callable[[Deliver, OnDeath], "EngineWorker"],
        line: Line,
    ) -> None:
        self.engine = engine
        self.line = line
        self.phase = Phase.STARTING
        self.created = int(time.time())
        self.failed = asyncio.Event()
        self._worker = make_worker(self._deliver, self._on_death)
        self._parts: dict[Reading, list[str]] = {}
        self._waiting: dict[str, int] = {}
        self._numbers = itertools.count()
        self._routes: dict[str, tuple[Reading, int]] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def start(self) -> None:
        """Start the engine's thread; its outputs come to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._worker.start()
        self.phase = Phase.READY

    def stop(self) -> None:
        """End the engine's thread; blocks for at most a step."""
        self._worker.stop()

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread lives."""
        return self._worker.is_alive

    def stats(self) -> EngineStats:
        """The engine's figures."""
        return self._worker.stats()

    def check_accepting(self) -> None:
        """Raise EngineStoppedError unless new work is taken."""
        if self.phase is not Phase.READY:
            raise EngineStoppedError(f"{self.phase}; it takes no new requests")

    async def open(self, name: str, order: Order) -> Reading:
        """Submit every prompt; choice c of prompt p is number p × params.n + c of the reading.

        `name` is for the log; it need not be unique.

        Raises ParameterError, EngineStoppedError, ApiError; then nothing is left running.
        """
        self.check_accepting()
        self.line.enter(len(order.prompts), order.num_prompt)
        num_choices = len(order.prompts) * order.params.n
        reading = Reading(num_choices, self._close, keeps_tokens=order.needs_tokens)
        name = f"{name}-{next(self._numbers)}"
        parts = self._parts[reading] = [f"{name}-{place}" for place in range(len(order.prompts))]
        self._idle.clear()
        for place, part in enumerate(parts):
            self._routes[part] = (reading, place * order.params.n)
            self._waiting[part] = len(order.prompts[place])
        self._limit_time(reading, order.deadline)
        try:
            if order.num_prompt > QUICK_IDS:
                await asyncio.to_thread(self._submit, reading, parts, order)
            else:
                self._submit(reading, parts, order)
        except BaseException:
            reading.close()
            raise
        return reading

    def _submit(self, reading: Reading, parts: Sequence[str], order: Order) -> None:
        """In any thread: a reader may leave meanwhile, and then its last prompts are not wanted."""
        for part, prompt_ids in zip(parts, order.prompts, strict=True):
            self._worker.submit(
                prompt_ids,
                order.params,
                request_id=part,
                priority=order.priority,
                start=order.start,
                cache_scope=order.cache_scope,
            )
            if reading.is_closed:
                self._worker.cancel(part)

    def _limit_time(self, reading: Reading, deadline: float | None) -> None:
        """What has not ended by then ends with what it has."""
        if deadline is not None:
            reading.timer = self._loop.call_at(deadline, self._expire, reading)

    def _expire(self, reading: Reading) -> None:
        for part in self._parts[reading]:
            self._worker.cancel(part, FinishReason.TIMEOUT)

    def _close(self, reading: Reading) -> None:
        if reading.timer is not None:
            reading.timer.cancel()
        for part in self._parts.pop(reading):
            self._leave_line(part)
            if self._routes.pop(part, None) and not reading.is_finished:
                self._worker.cancel(part)
        if not self._parts:
            self._idle.set()

    def _leave_line(self, part: str, *, was_served: bool = False) -> None:
        """At a prompt's first output, or where it goes without one."""
        if (num_tokens := self._waiting.pop(part, None)) is not None:
            self.line.leave(1, num_tokens, was_served=was_served)

    def drain(self) -> None:
        """Refuse new work from now on; what runs goes on."""
        if self.phase is not Phase.FAILED:
            self.phase = Phase.DRAINING

    def cancel_all(self) -> None:
        """Cancel whatever runs; every reader gets its final pieces."""
        for part in self._routes:
            self._worker.cancel(part)

    async def wait_idle(self) -> None:
        """Return when every reading is closed."""
        await self._idle.wait()

    def _deliver(self, outputs: list[Output]) -> None:
        """In the engine's thread: post a whole step at once."""
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._dispatch, outputs)

    def _dispatch(self, outputs: list[Output]) -> None:
        for output in outputs:
            if output.finish_reason is FinishReason.ERROR:
                logger.error("request %s failed: %s", output.request_id, output.error)
            if route := self._routes.get(output.request_id):
                reading, first = route
                self._leave_line(output.request_id, was_served=output.finish_reason in SERVED)
                reading.deliver(first + output.choice, output)

    def _on_death(self, error: BaseException) -> None:
        """In the engine's thread, as its last act."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._fail, error)

    def _fail(self, error: BaseException) -> None:
        logger.critical("the engine's thread died", exc_info=error)
        self.phase = Phase.FAILED
        for reading in self._parts:
            reading.fail()
        self.failed.set()

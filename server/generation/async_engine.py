"""Between the event loop and the engine's thread.

Owns whether new work is taken, and the one post per step from the engine's thread to the loop; who
gets what of it is `routes.py`'s. Everything here but `_deliver` and `_on_death` runs on the loop.
Knows no HTTP.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

from cottention.engine.errors import EngineStoppedError
from cottention.engine.outputs import EngineStats, Output
from cottention.server.generation.admission import AdmissionQueue
from cottention.server.generation.dispatch import OutputDispatcher
from cottention.server.generation.latency import LatencyStats
from cottention.server.generation.output_stream import OutputStream
from cottention.server.generation.request import QUICK_IDS, GenerationRequest

if TYPE_CHECKING:  # the engine brings torch with it, which the server does not know
    from cottention.engine.engine import Engine
    from cottention.engine.worker import EngineWorker

logger = logging.getLogger("cottention")

Deliver = Callable[[list[Output]], None]
OnDeath = Callable[[BaseException], None]


class Phase(StrEnum):
    """The server's life; each value is how a client is told that it is so."""

    STARTING = "the server is starting"
    READY = "the server is ready"
    DRAINING = "the server is shutting down"
    FAILED = "the engine has stopped"


class AsyncEngine:
    """Submits for readers, and hands each reader its pieces."""

    def __init__(
        self,
        engine: "Engine",
        make_worker: Callable[[Deliver, OnDeath], "EngineWorker"],
        line: AdmissionQueue,
        max_unread: int,
    ) -> None:
        """max_unread: bytes of a stream that wait for its reader before it pauses."""
        self.engine = engine
        self.line = line
        self._max_unread = max_unread
        self.phase = Phase.STARTING
        self.created = int(time.time())
        self.failed = asyncio.Event()
        self._worker = make_worker(self._deliver, self._on_death)
        self._routes = OutputDispatcher(self._worker, line, time.monotonic)
        self._numbers = itertools.count()

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

    @property
    def timings(self) -> LatencyStats:
        """How long things took."""
        return self._routes.timings

    def stats(self) -> EngineStats:
        """The engine's figures."""
        return self._worker.stats()

    def check_accepting(self) -> None:
        """Raise EngineStoppedError unless new work is taken."""
        if self.phase is not Phase.READY:
            raise EngineStoppedError(f"{self.phase}; it takes no new requests")

    async def open(self, name: str, order: GenerationRequest) -> OutputStream:
        """Submit every prompt; choice c of prompt p is number p × params.n + c of the reading.

        `name` is for the log; it need not be unique.

        Raises ParameterError, EngineStoppedError, ApiError; then nothing is left running.
        """
        self.check_accepting()
        name = f"{name}-{next(self._numbers)}"
        parts = [f"{name}-{place}" for place in range(len(order.prompts))]
        reading = self._routes.open(parts, order, self._max_unread)
        try:
            if order.num_prompt > QUICK_IDS:
                await asyncio.to_thread(self._submit, reading, parts, order)
            else:
                self._submit(reading, parts, order)
        except BaseException:
            reading.close()
            raise
        return reading

    def _submit(
        self, reading: OutputStream, parts: Sequence[str], order: GenerationRequest
    ) -> None:
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

    def drain(self) -> None:
        """Refuse new work from now on; what runs goes on."""
        if self.phase is not Phase.FAILED:
            self.phase = Phase.DRAINING

    def cancel_all(self) -> None:
        """Cancel whatever runs; every reader gets its final pieces."""
        self._routes.cancel_all()

    async def wait_idle(self) -> None:
        """Return when every reading is closed."""
        await self._routes.wait_idle()

    def _deliver(self, outputs: list[Output]) -> None:
        """In the engine's thread: post a whole step at once."""
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._routes.dispatch, outputs, time.monotonic())

    def _on_death(self, error: BaseException) -> None:
        """In the engine's thread, as its last act."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._fail, error)

    def _fail(self, error: BaseException) -> None:
        logger.critical("the engine's thread died", exc_info=error)
        self.phase = Phase.FAILED
        for reading in self._routes.readings:
            reading.fail()
        self.failed.set()

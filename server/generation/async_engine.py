"""The engine as the event loop sees it: `generate`, `stats`, drain and shutdown.

The engine steps in a thread of its own. Its outputs are handed over to the event loop, several
steps together where they come fast, and dispatched there. Everything runs on the event loop except
`_deliver` and `_on_death`, which the engine's thread calls, and `_submit`, which may run in any.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, cast

from cottention.engine.errors import EngineStoppedError
from cottention.engine.outputs import EngineStats, Output
from cottention.engine.scheduling.client import DEFAULT_CLIENT, Client
from cottention.engine.scheduling.prefill_stops import CacheUse
from cottention.server.generation.admission import AdmissionQueue
from cottention.server.generation.dispatch import Handover, OutputDispatcher
from cottention.server.generation.latency import LatencyStats
from cottention.server.generation.output_stream import OutputStream
from cottention.server.generation.request import GenerationRequest
from cottention.server.http.errors import expired
from cottention.server.http.shares import FairTurns

if TYPE_CHECKING:  # these import torch, which the server must not load
    from cottention.engine.encoder_engine import EncoderEngine
    from cottention.engine.engine import Engine
    from cottention.engine.state.session_state import SessionState
    from cottention.engine.worker import EngineWorker

logger = logging.getLogger("cottention")

Deliver = Callable[[list[Output]], None]
OnDeath = Callable[[BaseException], None]


class Phase(StrEnum):
    """Phase of the server's life; the values are used in error messages."""

    STARTING = "the server is starting"
    READY = "the server is ready"
    DRAINING = "the server is shutting down"
    FAILED = "the engine has stopped"


class AsyncEngine:
    """Submits generation requests to the engine's thread and streams their outputs."""

    def __init__(
        self,
        engine: "Engine | EncoderEngine",
        make_worker: Callable[[Deliver, OnDeath], "EngineWorker"],
        admission_queue: AdmissionQueue,
        max_unread_bytes: int,
    ) -> None:
        """max_unread_bytes: unread output of a stream at which its generation pauses."""
        self.engine = engine
        self.admission_queue = admission_queue
        self._max_unread_bytes = max_unread_bytes
        self.phase = Phase.STARTING
        self.created = int(time.time())
        self.failed = asyncio.Event()
        self._worker = make_worker(self._deliver, self._on_death)
        self._dispatcher = OutputDispatcher(self._worker, admission_queue, time.monotonic)
        self._counter = itertools.count()
        self._grammar_turns = FairTurns(1)

    def start(self) -> None:
        """Start the engine's thread; its outputs go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._handover = Handover(self._loop, self._dispatcher.dispatch)
        self._worker.start()
        self.phase = Phase.READY

    def stop(self) -> None:
        """End the engine's thread; blocks for at most a step."""
        self._worker.stop()

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread is alive."""
        return self._worker.is_alive

    @property
    def latency(self) -> LatencyStats:
        """Latency histograms of all requests."""
        return self._dispatcher.latency

    @property
    def streams(self) -> list[OutputStream]:
        """Streams that are not closed."""
        return self._dispatcher.streams

    def stats(self) -> EngineStats:
        """The engine's statistics at this moment."""
        return self._worker.stats()

    def check_accepting(self) -> None:
        """Raise EngineStoppedError unless new requests are accepted."""
        if self.phase is not Phase.READY:
            raise EngineStoppedError(f"{self.phase}; it takes no new requests")

    async def generate(
        self,
        name: str,
        request: GenerationRequest,
        *,
        start: "SessionState | None" = None,
        deadline: float | None = None,
        cache: CacheUse | None = None,
        client: Client = DEFAULT_CLIENT,
        replayed: Sequence[int] | None = None,
    ) -> OutputStream:
        """Submit every prompt; choice c of prompt p is number p * params.n + c of the stream.

        name: for the log; it need not be unique.
        start: the session that the prompt continues; its next state comes with the last output.
        deadline: event loop time at which the request ends with what it has.
        client: whose turn at the slots it is.
        cache: how the prompts use the prefix cache; None: not at all.
        replayed: of a turn whose outputs must not be merged, the ids that it has generated before.

        Raises ParameterError, EngineStoppedError, ApiError (queue full, or the deadline has
        passed); then nothing is left running.
        """
        self.check_accepting()
        if deadline is not None and deadline <= asyncio.get_running_loop().time():
            raise expired()
        name = f"{name}-{next(self._counter)}"
        request_ids = [f"{name}-{place}" for place in range(len(request.prompts))]
        stream = self._dispatcher.open_stream(
            request_ids,
            request,
            keeps_token_ids=start is not None or request.needs_token_ids,
            max_unread_bytes=(
                self._max_unread_bytes if request.is_stream or replayed is not None else None
            ),
            keeps_apart=replayed is not None,
            deadline=deadline,
            owner=client.id,
        )
        try:
            if request.is_slow_to_submit:
                async with self._turn_to_compile(request, client):
                    await asyncio.to_thread(
                        self._submit, stream, request_ids, request, start, cache, client, replayed
                    )
            else:
                self._submit(stream, request_ids, request, start, cache, client, replayed)
        except BaseException:
            stream.close()
            raise
        return stream

    @contextlib.asynccontextmanager
    async def _turn_to_compile(
        self, request: GenerationRequest, client: Client
    ) -> AsyncIterator[None]:
        """Wait for a turn where a grammar is to be compiled: clients have turns, one at a time.

        There are few threads, and one process that compiles: a client's heavy grammars would keep
        the bodies of others out of these, and their grammars behind its own.
        """
        structured = request.params.structured
        if structured is None or cast("Engine", self.engine).has_grammar(structured):
            yield
            return
        async with self._grammar_turns.turn(client.id):
            yield

    def _submit(
        self,
        stream: OutputStream,
        request_ids: Sequence[str],
        request: GenerationRequest,
        start: "SessionState | None",
        cache: CacheUse | None,
        client: Client,
        replayed: Sequence[int] | None,
    ) -> None:
        """In any thread.

        Meanwhile the deadline may pass, the stream be closed or the server stop: the engine, which
        did not know the prompt yet, is asked to cancel it again.
        """
        for request_id, prompt_ids in zip(request_ids, request.prompts, strict=True):
            self._worker.submit(
                prompt_ids,
                request.params,
                request_id=request_id,
                priority=request.priority,
                start=start,
                cache=cache,
                client=client,
                **({"replayed": replayed} if replayed else {}),
            )
            if (reason := stream.cancel_reason) is not None:
                self._worker.cancel(request_id, reason)

    def drain(self) -> None:
        """Refuse new requests from now on; running ones continue."""
        if self.phase is not Phase.FAILED:
            self.phase = Phase.DRAINING

    def cancel(self, stream: OutputStream) -> None:
        """Cancel a request whose client asked for it; its stream gets the final outputs."""
        self._dispatcher.cancel(stream)

    def cancel_all(self) -> None:
        """Cancel all running requests; their streams get the final outputs."""
        self._dispatcher.cancel_all()

    async def wait_idle(self) -> None:
        """Return when every stream is closed."""
        await self._dispatcher.wait_idle()

    def _deliver(self, outputs: list[Output]) -> None:
        """Called by the engine's thread: hand the outputs of a step to the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop is closed and has no readers
            self._handover.post(outputs)

    def dispatch(self) -> None:
        """Dispatch at once what the engine's thread has delivered."""
        self._handover.dispatch()

    def _on_death(self, error: BaseException) -> None:
        """Called by the engine's thread just before it ends with an error."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._fail, error)

    def _fail(self, error: BaseException) -> None:
        self.dispatch()
        logger.critical("the engine's thread died: %s", error, exc_info=error)
        self.phase = Phase.FAILED
        for stream in self._dispatcher.streams:
            stream.fail()
        self.failed.set()

"""The engine's thread: it runs steps while there is work and sleeps while there is none."""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from cottention.engine.outputs import EngineStats, FinishReason, Output
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.scheduling.client import DEFAULT_CLIENT, Client
from cottention.engine.scheduling.prefill_stops import CacheUse

if TYPE_CHECKING:  # a worker is given its engine, and works with any that has these methods
    from cottention.engine.encoder_engine import EncoderEngine
    from cottention.engine.engine import Engine
    from cottention.engine.state.session_state import SessionState

Deliver = Callable[[list[Output]], None]
"""Takes the outputs of a step; called once for each step that has any."""


class EngineWorker:
    """Runs an engine in a thread of its own; its methods may be called from any thread."""

    def __init__(
        self,
        engine: "Engine | EncoderEngine",
        deliver: Deliver,
        on_death: Callable[[BaseException], None],
    ) -> None:
        """`on_death` is called with an exception that ended the thread.

        The engine is closed then: it delivers nothing and accepts no requests.
        """
        self._engine = engine
        self._deliver = deliver
        self._on_death = on_death
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        start: "SessionState | None" = None,
        cache: CacheUse | None = None,
        client: Client = DEFAULT_CLIENT,
        **more: Sequence[int],
    ) -> str:
        """As Engine.submit. more: `replayed`, which only an engine with sessions has."""
        self._engine.submit(
            prompt_ids,
            params,
            request_id=request_id,
            priority=priority,
            start=start,
            cache=cache,
            client=client,
            **more,
        )
        self._wake.set()
        return request_id

    def cancel(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """As Engine.cancel."""
        self._engine.cancel(request_id, reason)
        self._wake.set()

    def pause(self, request_id: str) -> None:
        """As Engine.pause."""
        self._engine.pause(request_id)
        self._wake.set()

    def resume(self, request_id: str) -> None:
        """As Engine.resume."""
        self._engine.resume(request_id)
        self._wake.set()

    def stats(self) -> EngineStats:
        """As Engine.stats."""
        return self._engine.stats()

    def stop(self) -> None:
        """Stop after the current step; unfinished requests get ABORT outputs."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _main(self) -> None:
        try:
            self._engine.warm_up()
            self._loop()
            self._send(self._engine.close())
        except BaseException as error:
            with suppress(Exception):  # it refuses new requests, even if closing fails
                self._engine.close()
            self._on_death(error)

    def _loop(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            if self._engine.has_work():
                self._send(self._engine.step())
            else:
                self._wake.wait()

    def _send(self, outputs: list[Output]) -> None:
        if outputs:
            self._deliver(outputs)

"""The one engine thread: steps while there is work, sleeps while there is none.

Owns the thread and the order of its end. Knows no asyncio: `deliver` may do what it likes with a
step's outputs, and is called once per step.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from cottention.engine.outputs import EngineStats, FinishReason, Output
from cottention.engine.sampling_params import SamplingParams

if TYPE_CHECKING:  # a worker drives an engine; it does not load one
    from cottention.engine.engine import Engine
    from cottention.engine.state.session_state import SessionState

Deliver = Callable[[list[Output]], None]


class EngineWorker:
    """Runs an engine in a thread of its own; `submit`, `cancel` and `stats` from any thread."""

    def __init__(
        self, engine: "Engine", deliver: Deliver, on_death: Callable[[BaseException], None]
    ) -> None:
        """`deliver` gets each step's outputs, never none; `on_death` what ended the thread.

        A thread that died has closed its engine: nothing more is delivered, nothing more is taken.
        """
        self._engine = engine
        self._deliver = deliver
        self._on_death = on_death
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        start: "SessionState | None" = None,
        cache_scope: str | None = None,
    ) -> str:
        """As Engine.submit."""
        self._engine.submit(
            prompt_ids,
            params,
            request_id=request_id,
            priority=priority,
            start=start,
            cache_scope=cache_scope,
        )
        self._wake.set()
        return request_id

    def cancel(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> None:
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
        """End after the current step; what is unfinished gets a CANCELLED output."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _main(self) -> None:
        try:
            self._loop()
            self._send(self._engine.close())
        except BaseException as error:
            with suppress(Exception):  # whatever state it is in, it refuses work from now on
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

"""Responses that run: what a client can ask about them before they have ended.

On the event loop.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from cottention.server.generation.cancellation import CANCEL_SECONDS, Cancellation
from cottention.server.responses.writer import ResponseWriter
from cottention.server.schemas.responses import JsonObject
from cottention.server.sessions.live_events import LiveEvents


@dataclass(frozen=True, slots=True, eq=False)
class RunningResponse:
    """One of them. live: its events, where it goes on without its client."""

    writer: ResponseWriter
    input: list[JsonObject]
    cancellation: Cancellation
    live: LiveEvents | None
    has_ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def cancel(self) -> None:
        """Cancel it, and wait until it has ended and is stored, or for CANCEL_SECONDS."""
        self.cancellation.request()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CANCEL_SECONDS):
                await self.has_ended.wait()


class RunningResponses:
    """Those of one application, by owner and id."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, str], RunningResponse] = {}

    def find(self, owner: str, response_id: str) -> RunningResponse | None:
        """The one of this id; None where none runs."""
        return self._running.get((owner, response_id))

    @contextlib.contextmanager
    def entered(self, owner: str, running: RunningResponse) -> Iterator[None]:
        """Have it found within the block."""
        key = owner, running.writer.response["id"]
        self._running[key] = running
        try:
            yield
        finally:
            running.has_ended.set()
            del self._running[key]

"""The events of a running turn that does not end with its client, and the response that follows it.

After the turn its events are read from the session's `EventLog`.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator
from secrets import token_hex

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cottention.engine.state.event_log import EventBuffer, EventLog
from cottention.server.generation.sse import KEEP_ALIVE, SSE_HEADERS, Events, body_of, until_gone
from cottention.server.http.errors import ApiError

EVENT_END = "\n\n"


def gone(message: str) -> ApiError:
    """A 410 for events that are no longer kept."""
    return ApiError(410, message, param="Last-Event-ID", code="events_gone")


def with_ids(turn: str, first: int, events: Iterable[bytes]) -> bytes:
    """Events as they are sent, each after its id: the turn, and the event's number in it."""
    return b"".join(
        b"id: %s-%d\n%s" % (turn.encode(), number, event)
        for number, event in enumerate(events, first)
    )


class LiveEvents:
    """The events of one running turn. To be used on the event loop only."""

    def __init__(self, max_bytes: int) -> None:
        self._buffer = EventBuffer(token_hex(8), max_bytes)
        self._followers: set[asyncio.Event] = set()
        self.has_ended = False

    @property
    def turn(self) -> str:
        """The first part of its events' ids."""
        return self._buffer.turn

    @property
    def first(self) -> int:
        """The number of the oldest event that is kept."""
        return self._buffer.first

    @property
    def stop(self) -> int:
        """The number that the next event will have."""
        return self._buffer.stop

    def add(self, text: str) -> None:
        """Append the events of a text, and wake the followers."""
        for event in _split(text):
            self._buffer.add(event)
        self._wake()

    def end(self) -> None:
        """Mark the end: no more events will come."""
        self.has_ended = True
        self._wake()

    def log_ending_with(self, text: str) -> EventLog:
        """The log of the turn if the events of `text` are its last ones. They are not added."""
        return self._buffer.to_log(*_split(text))

    def since(self, number: int) -> bytes:
        """The event of this number, which is at least `first`, and those after it, as sent."""
        return with_ids(self.turn, number, self._buffer.since(number))

    @contextlib.contextmanager
    def following(self, follower: asyncio.Event) -> Iterator[None]:
        """Within the block `follower` is set at every change."""
        self._followers.add(follower)
        try:
            yield
        finally:
            self._followers.remove(follower)

    def _wake(self) -> None:
        for follower in self._followers:
            follower.set()


class LiveEventResponse(Response):
    """Sends a running turn's events from a number on; the turn does not depend on the client."""

    media_type = "text/event-stream"

    def __init__(self, live: LiveEvents, number: int, keep_alive: float) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(SSE_HEADERS)
        self._live = live
        self._number = number
        self._keep_alive = keep_alive
        self._changed = asyncio.Event()

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        watcher = asyncio.create_task(until_gone(receive))
        watcher.add_done_callback(lambda _: self._changed.set())
        try:
            with self._live.following(self._changed), contextlib.suppress(asyncio.CancelledError):
                await send(start)
                async for raw in self._told(watcher):
                    await send(body_of(raw, more_body=True))
                await send(body_of(b"", more_body=False))
        finally:
            watcher.cancel()

    async def _told(self, watcher: "asyncio.Task[None]") -> AsyncIterator[bytes]:
        live = self._live
        while not watcher.done():
            self._changed.clear()
            if self._number < live.first:
                error = gone("this client fell behind by more events than the server keeps")
                yield Events.error(error).encode()
                return
            if missed := live.since(self._number):
                self._number = live.stop
                yield missed
            elif live.has_ended:
                return
            elif not await self._changes():
                yield KEEP_ALIVE.encode()

    async def _changes(self) -> bool:
        """Whether there was a change before a keep-alive comment is due."""
        try:
            async with asyncio.timeout(self._keep_alive):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True


def _split(text: str) -> list[bytes]:
    """The events of a text, each with its end, which does not occur inside an event."""
    return [f"{each}{EVENT_END}".encode() for each in text.split(EVENT_END)[:-1]]

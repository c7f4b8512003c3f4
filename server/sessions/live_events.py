"""The events of a turn that goes on without its client, as long as it runs.

Owns the ids of events, and that each follower is told every event from where it began, once. What
is kept of them after the turn is the engine's `EventLog`.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from secrets import token_hex

from cottention.engine.state.event_log import EventBuffer, EventLog
from cottention.server.generation.sse import EventFormatter
from cottention.server.http.errors import ApiError

EVENT_END = "\n\n"


def gone(message: str) -> ApiError:
    """A 410 for events that are no more."""
    return ApiError(410, message, param="Last-Event-ID", code="events_gone")


def with_ids(turn: str, first: int, events: Iterable[bytes]) -> bytes:
    """Events as they are sent: each behind its id, which is its turn and its number in it."""
    return b"".join(
        b"id: %s-%d\n%s" % (turn.encode(), number, event)
        for number, event in enumerate(events, first)
    )


class LiveEvents:
    """Events of one turn, newest last; on the event loop alone, but for `kept`."""

    def __init__(self, max_bytes: int) -> None:
        self._filling = EventBuffer(token_hex(8), max_bytes)
        self._followers: set[asyncio.Event] = set()
        self.has_ended = False

    @property
    def turn(self) -> str:
        """What its events' ids begin with."""
        return self._filling.turn

    @property
    def first(self) -> int:
        """The number of the oldest event that is here."""
        return self._filling.first

    @property
    def stop(self) -> int:
        """The number that the next event will have."""
        return self._filling.stop

    def add(self, text: str) -> None:
        """One event, or several."""
        for event in _parted(text):
            self._filling.add(event)
        self._wake()

    def end(self) -> None:
        """No more will come."""
        self.has_ended = True
        self._wake()

    def kept(self, text: str) -> EventLog:
        """What is left of the turn if it ends with this text; nothing is added."""
        return self._filling.kept(*_parted(text))

    def since(self, number: int) -> bytes:
        """The event of this number and those after it, as they are sent."""
        return with_ids(self.turn, number, self._filling.since(number))

    def add_follower(self, follower: asyncio.Event) -> None:
        """Set the follower at every change, until `remove_follower`."""
        self._followers.add(follower)

    def remove_follower(self, follower: asyncio.Event) -> None:
        """The opposite of `add_follower`. Idempotent."""
        self._followers.discard(follower)

    def _wake(self) -> None:
        for follower in self._followers:
            follower.set()


class LiveEventFollower:
    """The events of a running turn from a number on; following has no effect on the turn."""

    def __init__(self, live: LiveEvents, number: int) -> None:
        self._live = live
        self._number = number
        self._changed = asyncio.Event()
        self._is_closed = False

    async def events(self, idle_seconds: float) -> AsyncIterator[bytes]:
        """As EventSource.events; ends with an error if the next event is no longer kept."""
        live = self._live
        live.add_follower(self._changed)
        while not self._is_closed:
            self._changed.clear()
            if self._number < live.first:
                error = gone("this client fell behind by more events than the server keeps")
                yield EventFormatter.error(error).encode()
                return
            if missed := live.since(self._number):
                self._number = live.stop
                yield missed
            elif live.has_ended:
                return
            elif not await self._wait_changed(idle_seconds):
                yield b""

    def close(self) -> None:
        """Stop following."""
        self._is_closed = True
        self._live.remove_follower(self._changed)
        self._changed.set()

    async def _wait_changed(self, idle_seconds: float) -> bool:
        """Whether there was a change within `idle_seconds`."""
        try:
            async with asyncio.timeout(idle_seconds):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True


def _parted(text: str) -> list[bytes]:
    """Events apart, each with its end; nothing inside one looks like that."""
    return [f"{each}{EVENT_END}".encode() for each in text.split(EVENT_END)[:-1]]

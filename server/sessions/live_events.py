"""The events of a running turn that does not end with its client, and what follows them.

After the turn its events are read from the session's `EventLog`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from itertools import islice
from secrets import token_hex

from cottention.engine.state.event_log import EventBuffer, EventLog, leading
from cottention.server.generation.output_stream import OutputStreamClosed
from cottention.server.generation.sse import EventFormatter
from cottention.server.http.errors import ApiError
from cottention.server.http.pacing import PIECE_BYTES

EVENT_END = "\n\n"


def gone(message: str) -> ApiError:
    """A 410 for events that are no longer kept."""
    return ApiError(410, message, param="Last-Event-ID", code="events_gone")


def with_ids(turn: str, first: int, events: Iterable[bytes]) -> bytes:
    """Events as they are sent, each after its id: the turn, and the event's number in it."""
    return b"".join(_id_line(turn, number) + event for number, event in enumerate(events, first))


def _id_line(turn: str, number: int) -> bytes:
    return b"id: %s-%d\n" % (turn.encode(), number)


class Transcript:
    """Bytes from the first on, or nothing where they are more than `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self._num_bytes = 0

    def add(self, part: bytes) -> None:
        """Append a part."""
        self._num_bytes += len(part)
        if self._num_bytes <= self._max_bytes:
            self._parts.append(part)
        else:
            self._parts.clear()

    def ending_with(self, part: bytes) -> bytes | None:
        """All parts and this one; None where they are too long."""
        if self._num_bytes + len(part) > self._max_bytes:
            return None
        return b"".join([*self._parts, part])


class LiveEvents:
    """The events of one running turn. To be used on the event loop only."""

    def __init__(self, max_bytes: int, turn: str | None = None) -> None:
        """turn: the first part of its events' ids; None for a new turn.

        was_cut: the turn goes on elsewhere, and its events here end in the middle.
        """
        self._buffer = EventBuffer(turn or token_hex(8), max_bytes)
        self._is_journaled = turn is not None
        self._followers: set[asyncio.Event] = set()
        self._transcript = Transcript(0)
        self.has_ended = False
        self.was_cut = False

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

    def may_come(self, number: int) -> bool:
        """Whether a client may have this event, which is not here yet, and wait for the next.

        So it is where a server that died has told more than it had journaled: who goes on with the
        turn says the same again.
        """
        return self._is_journaled and not self.has_ended and number >= self.stop

    def keep_all(self, max_bytes: int) -> None:
        """Keep all events from the first on, as far as they have at most so many bytes."""
        self._transcript = Transcript(max_bytes)

    def all_ending_with(self, text: str) -> bytes | None:
        """All events as they are sent, those of `text` last; None where they are too long."""
        events = _split(text)
        return self._transcript.ending_with(with_ids(self.turn, self.stop, events))

    def add(self, text: str) -> None:
        """Append the events of a text, and wake the followers."""
        events = _split(text)
        self._transcript.add(with_ids(self.turn, self.stop, events))
        for event in events:
            self._buffer.add(event)
        self._wake()

    def end(self) -> None:
        """Mark the end: no more events will come."""
        self.has_ended = True
        self._wake()

    def cut(self) -> None:
        """End without an end: clients shall ask another server for more."""
        self.was_cut = True
        self.end()

    def log_ending_with(self, text: str) -> EventLog:
        """The log of the turn if the events of `text` are its last ones. They are not added."""
        return self._buffer.to_log(*_split(text))

    @property
    def is_followed(self) -> bool:
        """Whether a client follows the turn."""
        return bool(self._followers)

    def since(self, number: int) -> list[bytes]:
        """The event of this number, which is at least `first`, and more, to be sent at once."""
        return self._buffer.since(number, PIECE_BYTES)

    def add_follower(self, follower: asyncio.Event) -> None:
        """Set `follower` at every change, until `remove_follower`."""
        self._followers.add(follower)

    def remove_follower(self, follower: asyncio.Event) -> None:
        """The opposite of `add_follower`. Idempotent."""
        self._followers.discard(follower)

    def _wake(self) -> None:
        for follower in self._followers:
            follower.set()


class LiveEventFollower:
    """The events of a running turn from a number on; the turn does not depend on the client."""

    def __init__(
        self, live: LiveEvents, number: int, release: Callable[[], None] = lambda: None
    ) -> None:
        """release: called by `close`."""
        self._live = live
        self._number = number
        self._release = release
        self._changed = asyncio.Event()
        self._is_closed = False
        live.add_follower(self._changed)

    async def events(self, idle_seconds: float) -> AsyncIterator[bytes]:
        """As EventSource.events; ends with an error if the next event is no longer kept.

        OutputStreamClosed: the turn goes on elsewhere.
        """
        live = self._live
        while not self._is_closed:
            self._changed.clear()
            if self._number < live.first:
                error = gone("this client fell behind by more events than the server keeps")
                yield EventFormatter.error(error).encode()
                return
            if missed := live.since(self._number):
                yield with_ids(live.turn, self._number, missed)
                self._number += len(missed)
            elif live.was_cut:
                raise OutputStreamClosed
            elif live.has_ended:
                return
            elif not await self._wait_changed(idle_seconds):
                yield b""

    def close(self) -> None:
        """Stop following."""
        self._is_closed = True
        self._live.remove_follower(self._changed)
        self._changed.set()
        self._release()

    async def _wait_changed(self, idle_seconds: float) -> bool:
        """Whether there was a change within `idle_seconds`."""
        try:
            async with asyncio.timeout(idle_seconds):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True


class StoredEvents:
    """The events of a turn that has ended, from a number on."""

    def __init__(self, log: EventLog, number: int, release: Callable[[], None]) -> None:
        """release: called by `close`."""
        self._log = log
        self._number = number
        self._release = release
        self._is_closed = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is sent."""
        log = self._log
        numbered = islice(enumerate(log.events, log.first), self._number - log.first, None)
        return sum(len(_id_line(log.turn, number)) + len(event) for number, event in numbered)

    async def events(self, _idle_seconds: float) -> AsyncIterator[bytes]:
        """As EventSource.events."""
        log, place = self._log, self._number - self._log.first
        while not self._is_closed and (piece := leading(log.events, place, PIECE_BYTES)):
            yield with_ids(log.turn, log.first + place, piece)
            place += len(piece)

    def close(self) -> None:
        """Send no more."""
        self._is_closed = True
        self._release()


def _split(text: str) -> list[bytes]:
    """The events of a text, each with its end, which does not occur inside an event."""
    return [f"{each}{EVENT_END}".encode() for each in text.split(EVENT_END)[:-1]]

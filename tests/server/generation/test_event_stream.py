"""EventStreamResponse with a source of its own: what is sent when, and that a source is closed."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from cottention.server.generation.output_stream import OutputStreamClosed
from cottention.server.generation.sse import KEEP_ALIVE, EventStreamResponse


class ListedEvents:
    """A source of these events; then it ends, or waits until it is closed."""

    def __init__(self, events: Sequence[bytes], *, ends: bool = True) -> None:
        self._events = events
        self._ends = ends
        self._closed = asyncio.Event()
        self.idle_seconds: float | None = None
        self.num_delivered = 0

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    async def events(self, idle_seconds: float) -> AsyncIterator[bytes]:
        self.idle_seconds = idle_seconds
        for each in self._events:
            yield each
            self.num_delivered += 1
        if not self._ends:
            await self._closed.wait()
            raise OutputStreamClosed

    def close(self) -> None:
        self._closed.set()


class Connection:
    """The ASGI side of a response: what was sent, and a client that can leave."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        self.blocks = asyncio.Event()
        self.blocks.set()

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        await self.blocks.wait()

    @property
    def bodies(self) -> list[bytes]:
        return [each["body"] for each in self.sent if each["type"] == "http.response.body"]


def test_events_are_sent_as_they_come_with_comments_for_idle_times() -> None:
    async def run() -> None:
        source, client = ListedEvents([b"data: 1\n\n", b"", b"data: 2\n\n"]), Connection()
        await EventStreamResponse(source, 7.5)({}, client.receive, client.send)
        assert client.bodies == [b"data: 1\n\n", KEEP_ALIVE, b"data: 2\n\n", b""]
        assert [each.get("more_body") for each in client.sent] == [None, True, True, True, False]
        assert source.idle_seconds == 7.5
        assert source.is_closed

    asyncio.run(run())


def test_a_disconnect_closes_the_source_while_it_waits() -> None:
    """Otherwise a client that leaves between two tokens keeps its slot until the next one."""

    async def run() -> None:
        source, client = ListedEvents([b"data: 1\n\n"], ends=False), Connection()
        response = EventStreamResponse(source, 7.5)
        running = asyncio.create_task(response({}, client.receive, client.send))
        while source.num_delivered < 1:
            await asyncio.sleep(0)
        client.left.set()
        await running
        assert source.is_closed
        assert client.bodies == [b"data: 1\n\n"], "nothing is sent after the disconnect"

    asyncio.run(run())


def test_a_disconnect_closes_the_source_while_the_client_does_not_read() -> None:
    """What is being sent then was not delivered: a session must not keep it."""

    async def run() -> None:
        source, client = ListedEvents([b"data: 1\n\n", b"data: 2\n\n"], ends=False), Connection()
        response = EventStreamResponse(source, 7.5)
        client.blocks.clear()
        running = asyncio.create_task(response({}, client.receive, client.send))
        while not client.sent:
            await asyncio.sleep(0)
        client.left.set()
        while not source.is_closed:
            await asyncio.sleep(0)
        assert source.num_delivered == 0
        client.blocks.set()
        await running

    asyncio.run(run())


def test_a_cancelled_stream_closes_its_source() -> None:
    """The server cancels streams whose clients do not read when it stops; that is no error."""

    async def run() -> None:
        source, client = ListedEvents([b"data: 1\n\n"], ends=False), Connection()
        response = EventStreamResponse(source, 7.5)
        running = asyncio.create_task(response({}, client.receive, client.send))
        while source.num_delivered < 1:
            await asyncio.sleep(0)
        running.cancel()
        await running
        assert source.is_closed

    asyncio.run(run())

"""A response that is made once and sent to any number of clients: `Recording`.

It is made in a task of its own, which no client ends by leaving. Runs on the event loop.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from cottention.server.generation.sse import KEEP_ALIVE, body_message, close_on_disconnect
from cottention.server.http.errors import ApiError
from cottention.server.http.pacing import PIECE_BYTES

Headers = Sequence[tuple[bytes, bytes]]
Answering = Callable[[Request], Awaitable[Response]]
"""An endpoint, given its request."""


EVENT_STREAM = b"text/event-stream"
LAST_EVENTS = (
    b"data: [DONE]",
    b"event: response.completed",
    b"event: response.incomplete",
    b"event: message_stop",
)
"""Lines of the last event of a stream that has come to its end, of each kind that there is."""
MAX_HEAD = 256
"""Bytes of an event's lines before its data."""
BUFFER_BYTES = 1024 * 1024
STALL_SECONDS = 30.0
"""How long a response waits for a client that does not read."""


class Recording:
    """The messages of one response, as they are made.

    max_bytes: of a body that is kept. Of a longer one there are BUFFER_BYTES at least, of which the
    oldest go when all readers have them: what makes it waits for them, STALL_SECONDS long. error:
    why there is no response, or no end of it.
    """

    def __init__(self, max_bytes: int) -> None:
        self.status = 0
        self.headers: Headers = ()
        self.error: BaseException | None = None
        self.has_ended = False
        self._max_bytes = max_bytes
        self._body = bytearray()
        self._first = 0
        self._last_event = b""
        self._is_whole = False
        self._places: dict[object, int] = {}
        self._changed = asyncio.Event()

    @property
    def is_event_stream(self) -> bool:
        """Whether the response is one, when it has begun."""
        return any(value.startswith(EVENT_STREAM) for _, value in self.headers)

    @property
    def answer(self) -> bytes | None:
        """The whole response as it is stored; None where it is no success.

        A stream of events is one where its last event is of LAST_EVENTS.
        """
        lines = self._last_event.split(b"\n", 2)[:2]  # there may be its id before it
        if self.is_event_stream and not any(each in LAST_EVENTS for each in lines):
            return None
        if not self._is_whole or not 200 <= self.status < 300:
            return None
        if self._first or len(self._body) > self._max_bytes:
            return encode_answer(0, (), b"")
        return encode_answer(self.status, self.headers, bytes(self._body))

    def answer_ending_with(self, last: bytes) -> bytes:
        """The response as it is stored, of which these bytes are still to be sent."""
        if self._first or len(self._body) + len(last) > self._max_bytes:
            return encode_answer(0, (), b"")
        return encode_answer(self.status, self.headers, bytes(self._body) + last)

    async def send(self, message: Message) -> None:
        """As ASGI has it. A message has whole events."""
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], message["headers"]
        elif message.get("body") != KEEP_ALIVE:  # it is no part of the answer
            body = message.get("body", b"")
            self._body += body
            if body and self.is_event_stream:
                self._last_event = body.removesuffix(b"\n\n").rpartition(b"\n\n")[2][:MAX_HEAD]
            self._is_whole = not message.get("more_body", False)
        self._wake()
        await self._make_room()

    def end(self, error: BaseException | None = None) -> None:
        """No more messages come. error: why the response is not whole."""
        if not self._is_whole:
            self.error = error or ConnectionResetError("the response was cut")
        self.has_ended = True
        self._wake()

    async def wait_begun(self) -> None:
        """Return when the response has begun. Raises the error of one that has not."""
        while not self.status and not self.has_ended:
            await self._changed.wait()
        if not self.status and self.error is not None:
            raise self.error

    def attach(self, reader: object) -> None:
        """A reader begins. Raises ApiError 410 where the beginning is no longer kept."""
        if self._first:
            raise not_kept()
        self._places[reader] = 0

    def detach(self, reader: object) -> None:
        """A reader has left. Idempotent."""
        self._places.pop(reader, None)
        self._wake()

    async def piece(self, reader: object) -> bytes:
        """What the reader has not read of the body, some of it; empty at its end.

        ConnectionResetError: it has no end, or the reader is too far behind.
        """
        place = self._places[reader]
        while True:
            start = place - self._first
            if start < 0:
                raise ConnectionResetError("this client fell behind")
            if start < len(self._body):
                piece = bytes(self._body[start : start + PIECE_BYTES])
                self._places[reader] = place + len(piece)
                if len(self._body) > self._room:
                    self._wake()
                return piece
            if self.has_ended:
                if self.error is not None:
                    raise ConnectionResetError("the response was cut") from self.error
                return b""
            await self._changed.wait()

    @property
    def _room(self) -> int:
        return max(self._max_bytes, BUFFER_BYTES)

    async def _make_room(self) -> None:
        while (excess := len(self._body) - self._room) > 0:
            # those who are too far behind are waited for no more
            reading = [place for place in self._places.values() if place >= self._first]
            unread = min(reading, default=self._first + excess)
            num_read = min(excess, unread - self._first)
            if not num_read:
                try:
                    async with asyncio.timeout(STALL_SECONDS):
                        await self._changed.wait()
                    continue
                except TimeoutError:
                    num_read = excess
            del self._body[:num_read]
            self._first += num_read

    def _wake(self) -> None:
        """Those that wait look again."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class RecordedResponse(Response):
    """Sends a recording to one client, who may leave."""

    def __init__(self, recording: Recording, keep_alive_seconds: float) -> None:
        """keep_alive_seconds: between comments while there are no events."""
        self.status_code = recording.status or 200
        self.background = None
        self.init_headers({})
        self._recording = recording
        self._is_closed = False
        self._keep_alive_seconds = keep_alive_seconds
        self._task: asyncio.Task[Any]
        recording.attach(self)

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; an error before the first byte becomes an error response."""
        recording = self._recording
        self._task = begun = asyncio.create_task(recording.wait_begun())
        async with close_on_disconnect(self, receive):
            await asyncio.wait([begun])
            if begun.cancelled():
                return
            begun.result()
            headers = list(recording.headers)
            await send(
                {"type": "http.response.start", "status": recording.status, "headers": headers}
            )
            while not self._is_closed:
                self._task = reading = asyncio.create_task(recording.piece(self))
                idle_seconds = self._keep_alive_seconds if recording.is_event_stream else None
                while not (await asyncio.wait([reading], timeout=idle_seconds))[0]:
                    await send(body_message(KEEP_ALIVE, more_body=True))
                if reading.cancelled():
                    return
                if not isinstance(reading.exception(), ConnectionResetError | None):
                    reading.result()
                if reading.exception() is not None:
                    return  # without its end: the client sees that the response was cut
                piece = reading.result()
                await send(body_message(piece, more_body=bool(piece)))
                if not piece:
                    return

    def close(self) -> None:
        """The client has left. Idempotent."""
        self._is_closed = True
        self._recording.detach(self)
        self._task.cancel()


def not_kept() -> ApiError:
    """A 410 for an answer that was too long to be repeated."""
    message = (
        "the request of this Idempotency-Key was executed, and its answer has more than"
        " --idempotency-bytes: it is neither kept nor made again"
    )
    return ApiError(410, message, param="Idempotency-Key", code="answer_not_kept")


def encode_answer(status: int, headers: Headers, body: bytes) -> bytes:
    """A response as it is stored; status 0 stands for one that was too long."""
    pairs = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in headers]
    return json.dumps({"status": status, "headers": pairs}).encode() + b"\n" + body


def answer_of(response: Response) -> bytes:
    """A whole response as it is stored."""
    return encode_answer(response.status_code, response.raw_headers, bytes(response.body))


def replayed(raw: bytes) -> Response:
    """The response that `encode_answer` has encoded. Raises ApiError 410."""
    head, _, body = raw.partition(b"\n")
    fields = json.loads(head)
    if not fields["status"]:
        raise not_kept()
    response = Response(body, fields["status"])
    response.raw_headers = [
        (name.encode("latin-1"), value.encode("latin-1")) for name, value in fields["headers"]
    ]
    if not any(name.lower() == b"content-length" for name, _ in response.raw_headers):
        response.raw_headers.append((b"content-length", str(len(body)).encode()))
    return response

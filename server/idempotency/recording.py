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

from cottention.server.generation.sse import body_message, close_on_disconnect
from cottention.server.http.errors import ApiError
from cottention.server.http.pacing import PIECE_BYTES

Headers = Sequence[tuple[bytes, bytes]]
Answering = Callable[[Request], Awaitable[Response]]
"""An endpoint, given its request."""


class Recording:
    """The messages of one response, as they are made, up to `max_bytes` of its body.

    Of a longer body the oldest bytes go: who has not read them by then cannot, and the answer is
    not kept. error: why there is no response, or no end of it.
    """

    def __init__(self, max_bytes: int) -> None:
        self.status = 0
        self.headers: Headers = ()
        self.error: BaseException | None = None
        self.has_ended = False
        self._max_bytes = max_bytes
        self._body = bytearray()
        self._first = 0
        self._is_whole = False
        self._changed = asyncio.Event()

    @property
    def answer(self) -> bytes | None:
        """The whole response as it is stored; None where it is no success."""
        if not self._is_whole or not 200 <= self.status < 300:
            return None
        body = TOO_LONG if self._first else bytes(self._body)
        return encode_answer(0 if self._first else self.status, self.headers, body)

    async def send(self, message: Message) -> None:
        """As ASGI has it."""
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], message["headers"]
        else:
            self._body += message.get("body", b"")
            excess = len(self._body) - self._max_bytes
            if excess > 0:
                del self._body[:excess]
                self._first += excess
            self._is_whole = not message.get("more_body", False)
        self._wake()

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

    async def piece(self, place: int) -> bytes:
        """Some of the body from this place on; empty at its end.

        ConnectionResetError: it has no end, or that place is no longer kept.
        """
        while True:
            start = place - self._first
            if start < 0:
                raise ConnectionResetError("this client fell behind")
            if start < len(self._body):
                return bytes(self._body[start : start + PIECE_BYTES])
            if self.has_ended:
                if self.error is not None:
                    raise ConnectionResetError("the response was cut") from self.error
                return b""
            await self._changed.wait()

    def _wake(self) -> None:
        """Readers that wait look again."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class RecordedResponse(Response):
    """Sends a recording to one client, who may leave."""

    def __init__(self, recording: Recording) -> None:
        self.status_code = recording.status or 200
        self.background = None
        self.init_headers({})
        self._recording = recording
        self._is_closed = False
        self._task: asyncio.Task[Any]

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; an error before the first byte becomes an error response."""
        recording, place = self._recording, 0
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
                self._task = reading = asyncio.create_task(recording.piece(place))
                await asyncio.wait([reading])
                if reading.cancelled():
                    return
                if not isinstance(reading.exception(), ConnectionResetError | None):
                    reading.result()
                if reading.exception() is not None:
                    return  # without its end: the client sees that the response was cut
                piece = reading.result()
                place += len(piece)
                await send(body_message(piece, more_body=bool(piece)))
                if not piece:
                    return

    def close(self) -> None:
        """The client has left. Idempotent."""
        self._is_closed = True
        self._task.cancel()


TOO_LONG = b""


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
        message = (
            "the request of this Idempotency-Key was answered, with more than --idempotency-bytes,"
            " and the answer was not kept; it is not executed again"
        )
        raise ApiError(410, message, param="Idempotency-Key", code="answer_not_kept")
    response = Response(body, fields["status"])
    response.raw_headers = [
        (name.encode("latin-1"), value.encode("latin-1")) for name, value in fields["headers"]
    ]
    if not any(name.lower() == b"content-length" for name, _ in response.raw_headers):
        response.raw_headers.append((b"content-length", str(len(body)).encode()))
    return response

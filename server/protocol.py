"""HTTP connections whose clients mean no good: bounds on a request's head, and on its time.

Owns when a connection is refused or given up before an endpoint knows of it, and the form of that
answer. A body's time is `body.py`'s. Knows uvicorn's protocol, and no endpoint.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.errors import ApiError

MAX_HEADERS = 128
MAX_HEAD_BYTES = 64 * 1024
LINGER_SECONDS = 2.0
"""How long a client may go on sending a body that nobody wants, so that it can read why."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *given: Any, receive_seconds: float, **named: Any) -> None:
        """receive_seconds: how long a request's head may take."""
        super().__init__(*given, **named)
        self._receive_seconds = receive_seconds
        self._refusal = ApiError(400, "this is no HTTP request")
        self._reads_head, self._reads_body = True, False
        self._num_head = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The first request's time begins."""
        super().connection_made(transport)  # type: ignore[arg-type]  # it is one of a socket
        self._set_timer(self._receive_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is there."""
        self._set_timer(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, and refuse a head that is too long."""
        super().data_received(data)
        if self._reads_head and not self._is_closing():
            self._num_head += len(data)
            if self._num_head > MAX_HEAD_BYTES:
                self._refuse(_too_large())

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        self._reads_head = True
        self._set_timer(self._receive_seconds)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One more; too many end the parsing."""
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._refusal = _too_large()
            raise ValueError("too many headers")

    def on_headers_complete(self) -> None:
        """An endpoint takes over."""
        self._reads_head, self._reads_body, self._num_head = False, True, 0
        self._set_timer(None)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body has come."""
        self._reads_body = False
        self._set_timer(None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """A body that goes on after its answer does so for a short while only."""
        super().on_response_complete()
        if self._reads_body and not self._is_closing():
            self._set_timer(LINGER_SECONDS)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """What uvicorn does where parsing fails."""
        self._refuse(self._refusal)

    def _refuse(self, error: ApiError) -> None:
        """Answer, unless another answer is on its way, and close."""
        self._set_timer(None)
        if not self._answers():
            body = error.body.encode()
            head = b"content-type: application/json\r\nconnection: close\r\n"
            length = b"content-length: %d\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[error.status] + head + length + body)
        self.transport.close()

    def _answers(self) -> bool:
        """Whether an answer is on its way, into the middle of which nothing may be put."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return False
        return cycle.response_started or bool(self.pipeline)

    def _set_timer(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._on_time)

    def _on_time(self) -> None:
        if self._reads_head and self._num_head:
            self._refuse(ApiError(408, "the request's head took too long", code="too_slow"))
        else:
            self.transport.close()

    def _is_closing(self) -> bool:
        return self.transport.is_closing()


def _too_large() -> ApiError:
    message = f"a request's head has at most {MAX_HEADERS} lines and {MAX_HEAD_BYTES} bytes"
    return ApiError(431, message, code="head_too_large")

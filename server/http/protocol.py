"""HTTP connections whose clients mean no good: bounds on a request's head, and on its time.

Owns when a connection is refused or given up before an endpoint knows of it, and the form of that
answer; and that no other protocol is spoken, whichever a client offers. A body's time is
`body.py`'s. Knows uvicorn's protocol, and no endpoint.

Answers to HTTP/1.0, which knows no chunks: one of unknown length ends with its connection.

Owns what is told to uvicorn, which would frame such an answer for HTTP/1.1. Knows no endpoint.
"""

import asyncio
import logging
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from cottention.server.http.errors import ApiError

logger = logging.getLogger("cottention")

MAX_HEADERS = 128
MAX_HEAD_BYTES = 64 * 1024
"""Of a request's head, and then of what frames its body beyond the body's own length."""

PIECE_BYTES = 16 * 1024
"""So much is parsed at a time: a head without an end, or what frames a body, is that much longer
when it is refused."""

MAX_AHEAD = 1024
"""Requests that a client may send before the answers to those before them."""

LINGER_SECONDS = 2.0
"""How long a client may go on sending a body that nobody wants, so that it can read why."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *given: Any, receive_seconds: float, **named: Any) -> None:
        """receive_seconds: how long a request's head may take."""
        super().__init__(*given, **named)
        self._receive_seconds = receive_seconds
        self._refusal = ApiError(400, "this is no HTTP request")
        self._reads_head, self._reads_body = False, False
        self._num_framing = 0
        self._answered: RequestResponseCycle | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The first request's time begins."""
        super().connection_made(transport)  # type: ignore[arg-type]  # it is one of a socket
        self._set_timer(self._receive_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is there; the base class tells the last request that came, not who is answered."""
        self._set_timer(None)
        super().connection_lost(exc)
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Parse what came, and refuse a request of which too much is no body."""
        self._unset_keepalive_if_required()
        for start in range(0, len(data), PIECE_BYTES):
            if self._is_closing():
                return
            piece = data[start : start + PIECE_BYTES]
            self._num_framing += len(piece)
            self._parse(piece)
            if self._num_framing > MAX_HEAD_BYTES and not self._is_closing():
                self._refuse(_too_large())

    def _parse(self, piece: bytes) -> None:
        while piece:
            try:
                self.parser.feed_data(piece)
                return
            except HttpParserUpgrade as offer:
                piece = self._declined(piece[offer.args[0] :])
            except HttpParserError:
                self._refuse(self._refusal)
                return

    def _declined(self, rest: bytes) -> bytes:
        """A request without its offer of another protocol, which the parser takes for accepted."""
        if self.parser.get_method() == b"CONNECT":
            self._refuse(self._refusal)
            return b""
        self.headers = [each for each in self.headers if each[0] != b"upgrade"]
        head = self._head()
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as the base class
        return head + rest

    def _head(self) -> bytes:
        """The head that was read, as clients usually write it."""
        version = self.parser.get_http_version().encode()
        first = b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, version)
        return first + b"".join(b"%b: %b\r\n" % each for each in self.headers) + b"\r\n"

    def on_message_begin(self) -> None:
        """A request's first byte; what came before it is no part of its head."""
        super().on_message_begin()
        self._reads_head, self._num_framing = True, 0
        self._set_timer(self._receive_seconds)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One more; too many end the parsing."""
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._refusal = _too_large()
            raise ValueError("too many headers")

    def on_headers_complete(self) -> None:
        """An endpoint takes over, unless the head is to be read again without an offer."""
        if len(self._head()) > MAX_HEAD_BYTES:
            self._refusal = _too_large()
            raise ValueError("too many bytes")
        if self.parser.should_upgrade():
            return
        self._reads_head, self._reads_body, self._num_framing = False, True, 0
        self._set_timer(None)
        super().on_headers_complete()
        if len(self.pipeline) > MAX_AHEAD:
            self._refusal = ApiError(400, f"at most {MAX_AHEAD} requests may be sent ahead")
            raise ValueError("too many requests")

    def on_body(self, body: bytes) -> None:
        """A part of it, which makes up for its own bytes and for as many that frame it."""
        self._num_framing = max(0, self._num_framing - 2 * len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body has come."""
        if self.parser.should_upgrade():
            return
        self._reads_body = False
        self._set_timer(None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """A body that goes on after its answer does so for a short while only."""
        super().on_response_complete()
        if self._reads_body and self.cycle.response_complete and not self._is_closing():
            self._set_timer(LINGER_SECONDS)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        if cycle.scope["http_version"] == "1.0":
            app = Http10Middleware(app, cycle)
        super()._start_asgi_task(cycle, app)

    def _refuse(self, error: ApiError) -> None:
        """Answer, unless another answer is on its way, and close."""
        logger.info("a connection is refused: %s", error)
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
        if self._reads_head:
            self._refuse(ApiError(408, "the request's head took too long", code="too_slow"))
        else:
            self.transport.close()

    def _is_closing(self) -> bool:
        return self.transport.is_closing()


def _too_large() -> ApiError:
    most = f"at most {MAX_HEADERS} lines and {MAX_HEAD_BYTES} bytes"
    message = f"a request's head, and what frames its body, has {most}"
    return ApiError(431, message, code="head_too_large")


class Http10Middleware:
    """An application whose one answer goes as it is; the connection is closed after it anyway."""

    def __init__(self, app: ASGIApp, cycle: RequestResponseCycle) -> None:
        self._app = app
        self._cycle = cycle
        self._is_sized = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def send_plain(message: Message) -> None:
            self._prepare(message)
            await send(message)

        await self._app(scope, receive, send_plain)

    def _prepare(self, message: Message) -> None:
        """Each part of the body counts as all that was announced, so that none is too much."""
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            self._is_sized = b"content-length" in names
            self._cycle.chunked_encoding = None if self._is_sized else False
        elif not self._is_sized:
            self._cycle.expected_content_length = len(message.get("body", b""))

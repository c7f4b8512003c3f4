"""HTTP connections, with limits against slow or malformed requests before an endpoint sees them.

Limits: the bytes, lines and time of a request's head, the bytes that frame its body, the number of
pipelined requests, how long a body may go on after its answer, and how long a client may take to
read what waits for it. Offers to upgrade to another
protocol are declined. Answers to HTTP/1.0, which has no chunked coding, are sent without it. A
target with a host of its own replaces the Host header.

`BoundedProtocol` derives from uvicorn's protocol, of which little is documented: what it uses of it
is listed and checked in `tests/server/http/test_uvicorn.py`.
"""

import asyncio
import logging
import math
from collections import deque
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser, parse_url
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from cottention.server.http.answer_writer import AnswerWriter, extensions_with
from cottention.server.http.connections import ConnectionTable, network_of, refusal
from cottention.server.http.errors import ApiError

logger = logging.getLogger("cottention")

MAX_HEADERS = 128
MAX_HEAD_BYTES = 64 * 1024
"""Limit of a request's head, and again of the chunk sizes, extensions and trailers of its body."""

PIECE_BYTES = 16 * 1024
"""Bytes parsed at a time: how much longer than allowed a head without an end can become."""

MAX_PIPELINED = 1024
"""Requests that a client may send before the first of them is answered."""

TLS_HANDSHAKE = b"\x16\x03"
"""What a client that expects TLS begins with."""

LINGER_SECONDS = 2.0
"""How long a body may go on after its answer: closing at once could lose the answer."""

MIN_BYTES_SENT = 16 * 1024
"""Of what waits for a client, the least that it has to read within the time for that."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self,
        *args: Any,
        table: ConnectionTable,
        receive_seconds: float,
        send_seconds: float,
        **kwargs: Any,
    ) -> None:
        """table: has had a place for this connection, and counts it from `connection_made` on.

        receive_seconds: limit of the time from the first byte of a request's head to its last.
        send_seconds: time in which a client that has stopped reading must read MIN_BYTES_SENT.
        The other arguments are uvicorn's.
        """
        super().__init__(*args, **kwargs)
        self._table = table
        self._receive_seconds = receive_seconds
        self._send_seconds = send_seconds
        self._socket: asyncio.Transport
        self._refusal: ApiError | None = None
        self._has_tls = False
        self._in_head, self._in_body = False, False
        self._num_head_bytes = self._num_framing_bytes = 0
        self._unanswered: deque[RequestResponseCycle] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(  # type: ignore[override]  # as uvicorn: it is one that writes
        self, transport: asyncio.Transport
    ) -> None:
        """Limit the time until the first request."""
        super().connection_made(transport)
        self._socket = transport
        self._has_tls = transport.get_extra_info("sslcontext") is not None
        self._table.add(self, network_of(self.client[0] if self.client else ""))
        self._set_timer(self._receive_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """Notify the request that is being answered; uvicorn would notify the newest one."""
        self._table.remove(self)
        self._set_timer(None)
        self._stop_unread_timer()
        if self._unanswered:
            self.cycle = self._unanswered[0]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and refuse requests with too many bytes outside of their bodies."""
        self._unset_keepalive_if_required()
        for start in range(0, len(data), PIECE_BYTES):
            if self._socket.is_closing():
                return
            piece = data[start : start + PIECE_BYTES]
            self._num_framing_bytes += len(piece)
            self._parse(piece)
            if self._num_framing_bytes > MAX_HEAD_BYTES and not self._socket.is_closing():
                self._refuse(_head_too_large())

    def _parse(self, piece: bytes) -> None:
        while piece:
            try:
                self.parser.feed_data(piece)
                return
            except HttpParserUpgrade as upgrade:
                piece = self._without_upgrade(piece[upgrade.args[0] :])
            except HttpParserError as error:
                self._refuse(self._refusal or _malformed(piece, error, has_tls=self._has_tls))
                return

    def _without_upgrade(self, rest: bytes) -> bytes:
        """The request to parse in place of one whose Upgrade header the parser took as accepted."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(ApiError(400, "CONNECT is not supported: this server is not a proxy"))
            return b""
        first = b"%b %b HTTP/%b\r\n" % (method, self.url, self.parser.get_http_version().encode())
        lines = (b"%b: %b\r\n" % each for each in self.headers if each[0] != b"upgrade")
        return first + b"".join(lines) + b"\r\n" + rest

    def on_message_begin(self) -> None:
        """Limit the time and the bytes of this request's head."""
        super().on_message_begin()
        self._in_head = True
        self._num_head_bytes = self._num_framing_bytes = 0
        self._set_timer(self._receive_seconds)

    def on_url(self, url: bytes) -> None:
        """Count a part of the target."""
        super().on_url(url)
        self._num_head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header line."""
        super().on_header(name, value)
        self._num_head_bytes += len(name) + len(value) + 4  # ": " and the line's end
        if len(self.headers) > MAX_HEADERS:
            self._stop_parsing(_head_too_large())

    def on_headers_complete(self) -> None:
        """Start the application, unless the head has to be parsed again without its upgrade."""
        self._num_head_bytes += len(self.parser.get_method()) + len(b"  HTTP/1.1\r\n\r\n")
        if self._num_head_bytes > MAX_HEAD_BYTES:
            self._stop_parsing(_head_too_large())
        if self.parser.should_upgrade():
            return
        self._in_head, self._in_body, self._num_framing_bytes = False, True, 0
        self._set_timer(None)
        self._use_host_of_target()
        super().on_headers_complete()
        self._unanswered.append(self.cycle)
        self._note_idle()
        if self.parser.get_http_version() == "1.0":
            self.cycle.transport = UnchunkedTransport(self._socket)
        self.scope["extensions"] = extensions_with(AnswerWriter(self.cycle))
        if len(self._unanswered) > MAX_PIPELINED + 1:
            self._stop_parsing(_too_many_pipelined())

    def _use_host_of_target(self) -> None:
        """A target in absolute form takes precedence over the Host header (RFC 9112, 3.2.2)."""
        if self.url.startswith(b"/"):
            return
        target = parse_url(self.url)
        if target.host and sum(name == b"host" for name, _ in self.headers) <= 1:
            host = b"[%b]" % target.host if b":" in target.host else target.host
            port = b":%d" % target.port if target.port else b""
            others = [each for each in self.headers if each[0] != b"host"]
            self.headers[:] = [*others, (b"host", host + port)]  # in place: it is in the scope

    def on_body(self, body: bytes) -> None:
        """Allow a part of a body as many bytes of framing as it has itself."""
        self._num_framing_bytes = max(0, self._num_framing_bytes - 2 * len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body has come."""
        if self.parser.should_upgrade():
            return
        self._in_body = False
        self._set_timer(None)
        super().on_message_complete()
        self._note_idle()

    def on_response_complete(self) -> None:
        """Limit the time of a body that goes on after its answer."""
        self._unanswered.popleft()
        super().on_response_complete()
        if self._in_body and not self._unanswered and not self._socket.is_closing():
            self._set_timer(LINGER_SECONDS)
        self._note_idle()

    def pause_writing(self) -> None:
        """More waits for the client than it reads: limit the time until it does."""
        super().pause_writing()
        self._watch_unread()

    def resume_writing(self) -> None:
        """The client has read most of what waited."""
        self._stop_unread_timer()
        super().resume_writing()

    def close_idle(self) -> bool:
        """As Connection.close_idle."""
        if self._socket.get_write_buffer_size():
            return False
        self._set_timer(None)
        if self._has_tls:  # closing would wait for the client's goodbye
            self._socket.abort()
        else:
            self._socket.close()
        return True

    def _note_idle(self) -> None:
        self._table.set_idle(self, is_idle=not (self._unanswered or self._in_body))

    def _watch_unread(self, before: float = math.inf) -> None:
        """Close the connection if its client reads too little. before: bytes that waited last."""
        num_bytes = self._socket.get_write_buffer_size()
        if num_bytes > before - MIN_BYTES_SENT:
            logger.info("closed a connection whose client has stopped reading")
            self._socket.abort()
            return
        loop = asyncio.get_running_loop()
        self._unread_timer = loop.call_later(self._send_seconds, self._watch_unread, num_bytes)

    def _stop_unread_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _stop_parsing(self, error: ApiError) -> None:
        """Make the parser fail, upon which the connection is refused with `error`."""
        self._refusal = error
        raise ValueError(str(error))

    def _refuse(self, error: ApiError) -> None:
        """Close the connection, with an error unless that would break into another answer."""
        logger.info("refused a connection: %s", error)
        self._set_timer(None)
        if not self._is_answering():
            self._socket.write(refusal(error))
        self._socket.close()

    def _is_answering(self) -> bool:
        """Whether an answer has begun, or several requests wait for theirs: none is an error's."""
        if len(self._unanswered) == 1:
            return self._unanswered[0].response_started
        return bool(self._unanswered)

    def _set_timer(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = None if seconds is None else loop.call_later(seconds, self._on_timer)

    def _on_timer(self) -> None:
        if self._in_head:
            self._refuse(_head_too_slow(self._receive_seconds))
        else:
            self._socket.close()


class UnchunkedTransport(asyncio.Transport):
    """Takes an answer in chunked coding, which HTTP/1.0 does not have, and writes it without.

    uvicorn uses that coding for every answer of unknown length. Without it such an answer ends with
    its connection, which uvicorn closes after each answer to HTTP/1.0.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport
        self._parser = HttpResponseParser(self)
        self._reason = b""
        self._headers: list[tuple[bytes, bytes]] = []

    def write(self, data: Any) -> None:
        """Write what of an answer has come."""
        self._parser.feed_data(data)

    def is_closing(self) -> bool:
        """Whether the connection is being closed."""
        return self._transport.is_closing()

    def close(self) -> None:
        """Close the connection after what has been written."""
        self._transport.close()

    def on_message_begin(self) -> None:
        """The parser has found an answer, or an interim one (100 Continue) before it."""
        self._headers.clear()

    def on_status(self, reason: bytes) -> None:
        """The parser has found the reason phrase."""
        self._reason = reason

    def on_header(self, name: bytes, value: bytes) -> None:
        """The parser has found a header line."""
        if name.lower() != b"transfer-encoding":
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The parser has found the end of the head."""
        head = b"HTTP/1.1 %d %b\r\n" % (self._parser.get_status_code(), self._reason)
        head += b"".join(b"%b: %b\r\n" % each for each in self._headers)
        self._transport.write(head + b"\r\n")

    def on_body(self, body: bytes) -> None:
        """The parser has found a part of the body."""
        self._transport.write(body)


def _malformed(data: bytes, error: HttpParserError, *, has_tls: bool) -> ApiError:
    if data.startswith(TLS_HANDSHAKE) and not has_tls:
        return ApiError(400, "this is a TLS handshake, and the server speaks HTTP without TLS")
    return ApiError(400, f"this is not a valid HTTP/1.1 request: {error}")


def _head_too_slow(seconds: float) -> ApiError:
    message = f"the request's head took longer than the {seconds:g} s allowed; send it at once"
    return ApiError(408, message, code="too_slow")


def _head_too_large() -> ApiError:
    message = (
        f"the request's head is too large: at most {MAX_HEADERS} header lines and"
        f" {MAX_HEAD_BYTES} bytes are allowed, and as many bytes of chunk sizes, extensions and"
        " trailers for its body; send fewer or shorter headers, or larger chunks"
    )
    return ApiError(431, message, code="head_too_large")


def _too_many_pipelined() -> ApiError:
    message = (
        f"at most {MAX_PIPELINED} requests may be pipelined;"
        " wait for answers before sending more on this connection"
    )
    return ApiError(400, message)

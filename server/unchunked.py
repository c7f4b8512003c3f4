"""Answers to HTTP/1.0, which knows no chunks: one of unknown length ends with its connection.

Owns what is told to uvicorn, which would frame such an answer for HTTP/1.1. Knows no endpoint.
"""

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


class Unchunked:
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

"""Requests that another server has to answer, and its responses, passed on as they come.

They go to addresses from the table of replicas alone, with the key of the client that sent them.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cottention.engine.errors import StoreUnavailableError
from cottention.engine.sessions.store.journal import SessionJournal
from cottention.server.generation.sse import body_message, close_on_disconnect
from cottention.server.http.errors import unavailable
from cottention.server.sessions.store_threads import in_store_thread

CONNECT_SECONDS = 2.0
IDLE_SECONDS = 0.5
"""Of silence, after which it is looked up whether the server lives."""
RELAYED = "x-cottention-relayed"
"""A request with this header is not passed on again. It gives no right to anything."""
FORWARDED = (
    "accept",
    "authorization",
    "content-type",
    "host",  # the one that this server accepts
    "idempotency-key",
    "if-match",
    "last-event-id",
    "origin",
    "x-api-key",
    "x-request-id",
)
RETURNED = (
    b"cache-control",
    b"content-length",
    b"content-type",
    b"etag",
    b"retry-after",
    b"x-accel-buffering",
)


IsAlive = Callable[[], Awaitable[bool]]
T = TypeVar("T")


async def while_alive(work: Coroutine[Any, Any, T], is_alive: IsAlive) -> T:
    """The result of waiting for a server. ConnectionError: it has died meanwhile.

    One that is stopped keeps its connections, and answers nothing.
    """
    task = asyncio.create_task(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=IDLE_SECONDS)
            if not task.done() and not await is_alive():
                raise ConnectionError("the server has died")
        return task.result()
    finally:
        task.cancel()


async def _next(pieces: AsyncIterator[bytes]) -> bytes:
    """The next of them; empty at their end."""
    return await anext(pieces, b"")


class HttpRelay:
    """Sends requests to other servers. `close` must be called."""

    def __init__(self, journal: SessionJournal) -> None:
        """journal: knows which servers live."""
        self._journal = journal
        self._client: Any = None

    async def __call__(self, url: str, request: Request, raw: bytes) -> Response:
        """The response of the server at `url` to a request with this body.

        ConnectionError: it cannot be reached. Raises ApiError 503 for what was relayed already.
        """
        import httpx

        if RELAYED in request.headers:
            raise unavailable("the session moves between servers")
        if self._client is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
            timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
            self._client = httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False)
        headers = {name: request.headers[name] for name in FORWARDED if name in request.headers}
        path = request.scope.get("raw_path", request.scope["path"].encode()).decode("latin-1")
        query = request.scope.get("query_string", b"").decode("latin-1")
        target = f"{url}{path}{'?' if query else ''}{query}"
        asked = self._client.build_request(
            request.method, target, headers=headers | {RELAYED: "1"}, content=raw
        )
        is_alive = partial(self._lives, url)
        try:
            upstream = await while_alive(self._client.send(asked, stream=True), is_alive)
        except httpx.TransportError as error:
            raise ConnectionError(str(error)) from error
        return RelayedResponse(upstream, is_alive)

    async def _lives(self, url: str) -> bool:
        try:
            return await in_store_thread(self._journal.lives, url)
        except StoreUnavailableError:
            return True  # nobody knows better

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()


class RelayedResponse(Response):
    """The response of another server; where that is cut, this one is cut as well."""

    def __init__(self, upstream: Any, is_alive: IsAlive) -> None:
        """upstream: httpx's response, not read yet. is_alive: whether its server lives."""
        self.status_code = upstream.status_code
        self.background = None
        self.raw_headers = [
            (name.lower(), value)
            for name, value in upstream.headers.raw
            if name.lower() in RETURNED
        ]
        self._upstream = upstream
        self._is_alive = is_alive
        self._is_closed = False

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        import httpx

        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        try:
            async with close_on_disconnect(self, receive):
                await send(start)
                pieces = self._upstream.aiter_raw()
                with contextlib.suppress(httpx.HTTPError, ConnectionError):
                    while not self._is_closed:
                        piece = await while_alive(_next(pieces), self._is_alive)
                        await send(body_message(piece, more_body=bool(piece)))
                        if not piece:
                            return
        finally:
            await self._upstream.aclose()

    async def body_bytes(self) -> bytes:
        """The whole body of a short response; empty where it was cut."""
        import httpx

        try:
            raw: bytes = await self._upstream.aread()
            return raw
        except httpx.HTTPError:
            return b""
        finally:
            await self._upstream.aclose()

    def close(self) -> None:
        """The client has left."""
        self._is_closed = True

"""Requests that are answered as others: HEAD as GET, and paths with doubled or final slashes."""

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

SLASHES = re.compile("/{2,}")


def plain_path(path: str) -> str:
    """A path without doubled and final slashes: `//v1//models/` is `/v1/models`."""
    return SLASHES.sub("/", path).rstrip("/") or "/"


class RoutingMiddleware:
    """The outermost middleware: keys, limits and endpoints see one spelling of a path, and GET.

    A HEAD is answered when its headers are known. The server is then done with the request, and an
    endpoint that streams finds its client disconnected.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # A copy: the HTTP server has to know that it answers a HEAD.
        routed = {**scope, "path": plain_path(scope["path"])}
        if scope["method"] != "HEAD":
            await self._app(routed, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self._app(routed | {"method": "GET"}, receive, send_head)

"""Long answers are sent in pieces, each when the client has read most of what came before.

uvicorn takes a body of any length at once and ends the request, so that what waits for a slow
client would be counted by nothing. In pieces it belongs to a request that is under way.
"""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

PIECE_BYTES = 64 * 1024


class PacingMiddleware:
    """Cuts the bodies of answers into pieces of PIECE_BYTES."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_paced(message: Message) -> None:
            body = message.get("body", b"")
            if len(body) > PIECE_BYTES:
                view = memoryview(body)
                stop = (len(body) - 1) // PIECE_BYTES * PIECE_BYTES
                for start in range(0, stop, PIECE_BYTES):
                    piece = bytes(view[start : start + PIECE_BYTES])
                    await send({"type": message["type"], "body": piece, "more_body": True})
                message = {**message, "body": bytes(view[stop:])}
            await send(message)

        await self._app(scope, receive, send_paced)

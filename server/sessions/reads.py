"""Reads of stored snapshots and events: how many there may be at once, and sending in pieces.

A read lasts until its client has all of it. What it holds meanwhile is a piece, not the whole.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cottention.engine.sessions.store import BlobReader
from cottention.server.generation.sse import body_message, close_on_disconnect
from cottention.server.http.errors import RETRY_AFTER_SECONDS, too_many
from cottention.server.http.pacing import PIECE_BYTES
from cottention.server.http.shares import Shares
from cottention.server.sessions.store_threads import in_store_thread


class ReadLimit:
    """The reads that are under way, by owner. To be used on the event loop only.

    They are `Shares`: one owner alone gets half of the places.
    """

    def __init__(self, max_reads: int) -> None:
        self._places = Shares(max_reads)

    @contextlib.contextmanager
    def reading(self, owner: str) -> Iterator[None]:
        """Have a place for a read. Raises ApiError 429."""
        places = self._places
        if not places.take(owner, 1):
            raise too_many(
                f"{places.num_held} snapshots and event logs are being sent,"
                f" {places.held_by(owner)} of them to this client; retry when one has ended",
                RETRY_AFTER_SECONDS,
                "too_many_reads",
            )
        try:
            yield
        finally:
            places.give_back(owner, 1)


class SnapshotResponse(Response):
    """Sends a snapshot; each piece is read when the one before it has gone."""

    media_type = "application/octet-stream"

    def __init__(
        self, snapshot: BlobReader, headers: Mapping[str, str], release: Callable[[], None]
    ) -> None:
        """release: called when no more is sent, however it ends."""
        self.status_code = 200
        self.background = None
        self.init_headers({"content-length": str(snapshot.nbytes), **headers})
        self._snapshot = snapshot
        self._release = release
        self._is_closed = False

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. StoreUnavailableError: the rest cannot be read."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        num_bytes, place = self._snapshot.nbytes, 0
        async with close_on_disconnect(self, receive):
            await send(start)
            while not self._is_closed and place < num_bytes:
                piece = await in_store_thread(self._snapshot.read, place, PIECE_BYTES)
                place += len(piece)
                await send(body_message(piece, more_body=place < num_bytes))

    def close(self) -> None:
        """End the read. Idempotent."""
        self._is_closed = True
        self._snapshot.close()
        self._release()

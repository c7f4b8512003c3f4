"""One line in the log for each request: who asked, what it took, how it ended.

Owns what the line tells. A prompt's text is told only where the server was asked to.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

from cottention.server.logs import FIELDS
from cottention.server.records import Record, record_of
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("cottention.requests")

QUIET_METHODS = ("GET", "HEAD", "OPTIONS")
"""Probes and scrapes come every few seconds."""


class Journal:
    """Middleware that writes the line when nothing more is done for the request.

    The answer has been sent by then or is not wanted any more, and a turn that goes on has ended.
    """

    def __init__(self, app: ASGIApp, num_characters: int, table: Sequence[bytes]) -> None:
        """num_characters: of each request's prompt; table: the bytes of ids."""
        self._app = app
        self._num_characters = num_characters
        self._table = table

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on one request."""
        if scope["type"] != "http" or scope["method"] in QUIET_METHODS:
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        record = record_of(scope)
        try:
            await self._app(scope, receive, sending)
        finally:
            record.when_ended(lambda: self._tell(_told(scope, record, status, began), record))

    def _tell(self, told: dict[str, Any], record: Record) -> None:
        if self._num_characters and record.prompt_ids:
            told["prompt"] = self._text(record.prompt_ids)
        logger.info("request", extra={FIELDS: told})

    def _text(self, ids: Sequence[int]) -> str:
        """An id has a character, or a part of one, at least."""
        raw = b"".join(self._table[each] for each in ids[: 4 * self._num_characters])
        return raw.decode("utf-8", errors="replace")[: self._num_characters]


def _told(scope: Scope, record: Record, status: int, began: float) -> dict[str, Any]:
    """Times are in seconds from the request's head; what there is not is left out."""
    told: dict[str, Any] = {
        "id": scope["state"]["request_id"],
        "key": record.key,
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "seconds": round(time.monotonic() - began, 4),
    }
    if not record.readings:
        return told
    for name, at in (("started", record.started), ("first_token", record.first_token)):
        if at is not None:
            told[f"{name}_after"] = round(at - began, 4)
    return told | {
        "prompt_tokens": record.num_prompt,
        "cached_tokens": record.num_cached,
        "completion_tokens": record.num_generated,
        "ended": record.ended,
    }

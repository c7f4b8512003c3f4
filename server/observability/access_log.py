"""One line in the log for each request: who asked, what it took, how it ended.

Owns what the line tells. A prompt's text is told only where the server was asked to.

What becomes of one HTTP request: who asked, what was read and said, when and why it ended.

Owns the figures alone, and when they are all there: a turn may go on when its client has left. What
is done with them is others'.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cottention.server.generation.output_stream import OutputStream
from cottention.server.log_config import FIELDS

LEFT = "client_left"
"""How a request ended whose client did not wait for its end."""


@dataclass(slots=True)
class RequestRecord:
    """key: the name of the one that was sent. num_prompt: tokens of all prompts.

    prompt_ids: of the first prompt. going_on: a turn that ends by itself, whoever waits for it.
    """

    key: str = ""
    num_prompt: int = 0
    prompt_ids: Sequence[int] = ()
    readings: list[OutputStream] = field(default_factory=list)
    going_on: asyncio.Task[None] | None = None

    def add(self, prompts: Sequence[Sequence[int]], reading: OutputStream) -> None:
        """The engine works for this request."""
        self.num_prompt += sum(map(len, prompts))
        self.prompt_ids = self.prompt_ids or prompts[0]
        self.readings.append(reading)

    def when_ended(self, tell: Callable[[], None]) -> None:
        """The request has been answered, or left: call `tell` when nothing is done for it."""
        if self.going_on is None or self.is_finished:
            tell()
        else:
            self.going_on.add_done_callback(lambda _: tell())

    @property
    def is_finished(self) -> bool:
        """Whether every choice has ended by itself."""
        return all(reading.is_finished for reading in self.readings)

    @property
    def num_generated(self) -> int:
        """Tokens of all choices."""
        return sum(reading.num_generated for reading in self.readings)

    @property
    def num_cached(self) -> int:
        """Tokens of prompts that were not read again."""
        return sum(reading.num_cached for reading in self.readings)

    @property
    def started(self) -> float | None:
        """When the first prompt had its slots."""
        return min((r.started for r in self.readings if r.started is not None), default=None)

    @property
    def first_token(self) -> float | None:
        """When the first token came."""
        return min((r.first_token for r in self.readings if r.first_token), default=None)

    @property
    def ended(self) -> str:
        """How its choices ended, each way once."""
        if not self.is_finished:
            return LEFT
        reasons = dict.fromkeys(each for reading in self.readings for each in reading.reasons)
        return ",".join(reasons)


def request_record(scope: Scope) -> RequestRecord:
    """The one of this request."""
    record: RequestRecord = scope["state"].setdefault("record", RequestRecord())
    return record


logger = logging.getLogger("cottention.requests")

QUIET_METHODS = ("GET", "HEAD", "OPTIONS")
"""Probes and scrapes come every few seconds."""


class AccessLogMiddleware:
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

        record = request_record(scope)
        try:
            await self._app(scope, receive, sending)
        finally:
            record.when_ended(lambda: self._tell(_told(scope, record, status, began), record))

    def _tell(self, told: dict[str, Any], record: RequestRecord) -> None:
        if self._num_characters and record.prompt_ids:
            told["prompt"] = self._text(record.prompt_ids)
        logger.info("request", extra={FIELDS: told})

    def _text(self, ids: Sequence[int]) -> str:
        """An id has a character, or a part of one, at least."""
        raw = b"".join(self._table[each] for each in ids[: 4 * self._num_characters])
        return raw.decode("utf-8", errors="replace")[: self._num_characters]


def _told(scope: Scope, record: RequestRecord, status: int, began: float) -> dict[str, Any]:
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

"""The access log: one line per request, with its key, its tokens, its times and how it ended.

`RequestRecord` collects what is logged and what a key is charged. A turn of a session may go on
after its client has left: its line is written when the turn has ended, by the server that ends it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cottention.server.generation.output_stream import OutputStream
from cottention.server.generation.request import GenerationRequest
from cottention.server.http.body_memory import release_bodies
from cottention.server.log_config import FIELDS

logger = logging.getLogger("cottention.requests")

CLIENT_DISCONNECTED = "client_disconnected"
"""The finish reason of a request whose client left before its end."""

UNLOGGED_METHODS = ("GET", "HEAD", "OPTIONS")
"""Health checks and scrapes come every few seconds."""


@dataclass(slots=True)
class RequestRecord:
    """What is known of one HTTP request.

    key_name: the name of its API key. num_prompt: tokens of all its prompts. prompt_ids: those of
    the first prompt. num_choices: what counts against its key's limit. streams: of what was
    generated for it. request: what was generated. response_id, session_id: of its answer.
    background_turn: a session's turn that does not end with its client.
    """

    key_name: str = ""
    num_prompt: int = 0
    prompt_ids: Sequence[int] = ()
    num_choices: int = 1
    streams: list[OutputStream] = field(default_factory=list)
    request: GenerationRequest | None = None
    response_id: str | None = None
    session_id: str | None = None
    background_turn: asyncio.Task[None] | None = None

    def add(self, request: GenerationRequest, stream: OutputStream) -> None:
        """Add the output of a request's prompts."""
        self.request = request
        self.num_prompt += request.num_prompt_tokens
        self.prompt_ids = self.prompt_ids or request.prompts[0]
        self.streams.append(stream)

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call `callback` now, or when the turn that goes on in the background has ended."""
        if self.background_turn is None or self.is_finished:
            callback()
        else:
            self.background_turn.add_done_callback(lambda _: callback())

    @property
    def is_finished(self) -> bool:
        """Whether all choices are finished."""
        return all(stream.is_finished for stream in self.streams)

    @property
    def num_generated(self) -> int:
        """Tokens of all choices."""
        return sum(stream.num_generated for stream in self.streams)

    @property
    def num_cached(self) -> int:
        """Prompt tokens that came from the prefix cache."""
        return sum(stream.num_cached for stream in self.streams)

    @property
    def started(self) -> float | None:
        """When the first prompt got its slots, by the monotonic clock."""
        return min((s.started for s in self.streams if s.started is not None), default=None)

    @property
    def first_token(self) -> float | None:
        """When the first token came, by the monotonic clock."""
        return min((s.first_token for s in self.streams if s.first_token), default=None)

    @property
    def finish_reason(self) -> str:
        """The distinct finish reasons of all choices, separated by commas."""
        if not self.is_finished:
            return CLIENT_DISCONNECTED
        return ",".join(dict.fromkeys(each for stream in self.streams for each in stream.reasons))


def request_record(scope: Scope) -> RequestRecord:
    """The record of the request of this scope."""
    record: RequestRecord = scope["state"].setdefault("record", RequestRecord())
    return record


class RequestHead(NamedTuple):
    """What a line begins with. began: when the head had arrived, by the monotonic clock."""

    request_id: str
    method: str
    path: str
    began: float


class AccessLog:
    """Writes the lines."""

    def __init__(
        self, num_characters: int, table: Sequence[bytes], key_names: Mapping[str, str]
    ) -> None:
        """num_characters: of each prompt to log; table: the bytes of each token id.

        key_names: by owner.
        """
        self._num_characters = num_characters
        self._table = table
        self._key_names = key_names

    def record_of(self, owner: str) -> RequestRecord:
        """The record of what goes on here for an owner whose request another server has had."""
        return RequestRecord(self._key_names.get(owner, ""))

    def write(self, record: RequestRecord, head: RequestHead, status: int) -> None:
        """One line, of a request that has ended."""
        fields = _fields(record, head, status)
        if self._num_characters and record.prompt_ids:
            fields["prompt"] = self._text(record.prompt_ids)
        logger.info("request", extra={FIELDS: fields})

    def _text(self, ids: Sequence[int]) -> str:
        """The first characters; an id has at least one byte, a character at most four."""
        raw = b"".join(self._table[each] for each in ids[: 4 * self._num_characters])
        return raw.decode("utf-8", errors="replace")[: self._num_characters]


class AccessLogMiddleware:
    """Logs each request after its response, or after its turn where that goes on for longer.

    Then its body is counted no more.
    """

    def __init__(self, app: ASGIApp, log: AccessLog) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] in UNLOGGED_METHODS:
            try:
                await self._app(scope, receive, send)
            finally:
                release_bodies(scope)
            return
        began, status = time.monotonic(), 0

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        record = request_record(scope)
        try:
            await self._app(scope, receive, send_and_note_status)
        finally:
            record.on_end(lambda: self._end(scope, record, status, began))

    def _end(self, scope: Scope, record: RequestRecord, status: int, began: float) -> None:
        release_bodies(scope)
        head = RequestHead(scope["state"]["request_id"], scope["method"], scope["path"], began)
        self._log.write(record, head, status)


def _fields(record: RequestRecord, head: RequestHead, status: int) -> dict[str, Any]:
    """Names and values of one line. Times are in seconds since `head.began`."""
    fields: dict[str, Any] = {
        "id": head.request_id,
        "key": record.key_name,
        "method": head.method,
        "path": head.path,
        "status": status,
        "seconds": round(time.monotonic() - head.began, 4),
    }
    if not record.streams:
        return fields
    for name, at in (("start", record.started), ("first_token", record.first_token)):
        if at is not None:
            fields[f"seconds_to_{name}"] = round(at - head.began, 4)
    return fields | {
        "prompt_tokens": record.num_prompt,
        "cached_tokens": record.num_cached,
        "completion_tokens": record.num_generated,
        "finish_reason": record.finish_reason,
    }

"""Server-sent events of a completion: their exact bytes, and the response that sends them.

Owns the framing and what happens when the reader leaves. An event is a prefix made once per
request, one escaped string and a suffix. Does not know the engine.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.outputs import FinishReason
from server.errors import ApiError, engine_failed
from server.reading import Piece, Reading, ReadingClosed

DONE = "data: [DONE]\n\n"
KEEP_ALIVE = ": keep-alive\n\n"
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True, slots=True)
class Heading:
    """What every chunk of an answer, and the whole one, begins with."""

    id: str
    object: str
    created: int
    model: str


class CompletionEvents:
    """The events of one streamed completion."""

    def __init__(self, heading: Heading, include_usage: bool) -> None:
        head = "data: " + json.dumps(asdict(heading), separators=(",", ":"))[:-1]
        self._piece = head + ',"choices":[{"index":'
        self._end = '}],"usage":null}\n\n' if include_usage else "}]}\n\n"
        self._usage = head + ',"choices":[],"usage":'
        self._include_usage = include_usage

    def pieces(self, pieces: Mapping[int, Piece]) -> str:
        """One event per choice that has something to tell."""
        return "".join(self._event(index, piece) for index, piece in pieces.items())

    def _event(self, index: int, piece: Piece) -> str:
        text, reason = piece.text, piece.finish_reason
        if reason is FinishReason.ERROR:
            reason = None
        if not text and reason is None:
            return ""
        # Escaped to ASCII, since some clients take U+2028 and its like for the end of a line.
        ending = f'"{reason}"' if reason else "null"
        return (
            f'{self._piece}{index},"text":{json.dumps(text)},"logprobs":null,'
            f'"finish_reason":{ending}{self._end}'
        )

    def last(self, usage: Mapping[str, int]) -> str:
        """What follows the last piece."""
        if not self._include_usage:
            return DONE
        return f"{self._usage}{json.dumps(usage, separators=(',', ':'))}}}\n\n{DONE}"

    @staticmethod
    def error(error: ApiError) -> str:
        """The event that ends a stream which could not be finished."""
        return f"data: {error.body}\n\n"


class EventStream(Response):
    """Sends a reading as events; a reader that leaves, at any point, closes it."""

    media_type = "text/event-stream"

    def __init__(
        self, reading: Reading, events: CompletionEvents, num_prompt: int, keep_alive: float
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(SSE_HEADERS)
        self._reading = reading
        self._events = events
        self._num_prompt = num_prompt
        self._keep_alive = keep_alive

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with closing(self._reading, receive):
            # Cancelled is a stream that nobody reads while the server stops: no fault to log.
            with contextlib.suppress(ReadingClosed, asyncio.CancelledError):
                await send(start)
                async for text in self._texts():
                    await send(_body(text, more_body=True))
                await send(_body("", more_body=False))

    async def _texts(self) -> AsyncIterator[str]:
        reading, events = self._reading, self._events
        while reading.has_more:
            pieces = await reading.take(self._keep_alive)
            if text := events.pieces(pieces):
                yield text
            if any(piece.finish_reason is FinishReason.ERROR for piece in pieces.values()):
                yield events.error(engine_failed())
                return
            if not pieces:
                yield KEEP_ALIVE
        yield events.last(usage_of(self._num_prompt, reading))


@contextlib.asynccontextmanager
async def closing(reading: Reading, receive: Receive) -> AsyncIterator[None]:
    """Close the reading at the end, or as soon as the client leaves."""
    watcher = asyncio.create_task(_close_when_gone(reading, receive))
    try:
        yield
    finally:
        watcher.cancel()
        reading.close()


def usage_of(num_prompt: int, reading: Reading) -> dict[str, int]:
    """The `usage` object of an answer."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": reading.num_generated,
        "total_tokens": num_prompt + reading.num_generated,
    }


async def _close_when_gone(reading: Reading, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    reading.close()


def _body(text: str, *, more_body: bool) -> dict[str, object]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more_body}

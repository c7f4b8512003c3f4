"""Server-sent events of an answer: their exact bytes, and the response that sends them.

Owns the framing and what happens when the reader leaves. An event is a prefix made once per
request, what a choice has to tell, and a suffix. Does not know the engine.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cottention.engine.outputs import FinishReason
from cottention.server.generation.choice_format import ChoiceFormatter, compact
from cottention.server.generation.output_stream import OutputDelta, OutputStream, OutputStreamClosed
from cottention.server.generation.request import GenerationRequest
from cottention.server.http.errors import ApiError, engine_failed
from cottention.server.schemas.responses import JsonObject

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


class Events:
    """The events of one streamed answer."""

    def __init__(
        self, heading: Heading, choices: ChoiceFormatter, order: GenerationRequest
    ) -> None:
        self._head = f"data: {compact(asdict(heading))[:-1]},"
        self._choices = choices
        self._num_prompt = order.num_prompt
        self._is_long = order.tells_long_prompt
        self._options = order.stream_options

    def pieces(self, pieces: Mapping[int, OutputDelta], num_generated: int) -> str:
        """One event per choice that has something to tell, or two where it begins."""
        return self.framed(self._chunks(pieces), num_generated)

    async def worded(self, pieces: Mapping[int, OutputDelta], num_generated: int) -> str:
        """As `pieces`; beside the loop where a long prompt is told."""
        return self.framed(await self.chunks(pieces), num_generated)

    async def chunks(self, pieces: Mapping[int, OutputDelta]) -> list[str]:
        """What each event tells; to be asked once for a piece."""
        if self._is_long:
            return await asyncio.to_thread(self._chunks, pieces)
        return self._chunks(pieces)

    def framed(self, chunks: Sequence[str], num_generated: int, beside: str = "") -> str:
        """Events of chunks. beside: further fields of each, from their comma on."""
        head, tail = self._head, beside + self._tail(num_generated)
        return "".join([f"{head}{chunk}{tail}" for chunk in chunks])

    def _chunks(self, pieces: Mapping[int, OutputDelta]) -> list[str]:
        return [
            chunk for index, piece in pieces.items() for chunk in self._choices.chunks(index, piece)
        ]

    def _tail(self, num_generated: int) -> str:
        if self._options.continuous_usage_stats:
            return f',"usage":{compact(usage_of(self._num_prompt, num_generated))}}}\n\n'
        return ',"usage":null}\n\n' if self._options.include_usage else "}\n\n"

    def last(self, num_generated: int, num_cached: int = 0) -> str:
        """What follows the last piece."""
        if not self._options.include_usage:
            return DONE
        usage = compact(usage_of(self._num_prompt, num_generated, num_cached))
        return f'{self._head}"choices":[],"usage":{usage}}}\n\n{DONE}'

    @staticmethod
    def error(error: ApiError) -> str:
        """The event that ends a stream which could not be finished."""
        return f"data: {error.body}\n\n"


class EventStream(Response):
    """Sends a reading as events; a reader that leaves, at any point, closes it."""

    media_type = "text/event-stream"

    def __init__(self, reading: OutputStream, events: Events, keep_alive: float) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(SSE_HEADERS)
        self._reading = reading
        self._events = events
        self._keep_alive = keep_alive

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with closing(self._reading, receive):
            # Cancelled is a stream that nobody reads while the server stops: no fault to log.
            with contextlib.suppress(OutputStreamClosed, asyncio.CancelledError):
                await send(start)
                async for text in self._texts():
                    await send(body_of(text.encode(), more_body=True))
                await send(body_of(b"", more_body=False))

    async def _texts(self) -> AsyncIterator[str]:
        reading, events = self._reading, self._events
        while reading.has_more:
            pieces = await reading.take(self._keep_alive)
            yield await events.worded(pieces, reading.num_generated) or KEEP_ALIVE
            if any(piece.finish_reason is FinishReason.ERROR for piece in pieces.values()):
                yield events.error(engine_failed())
                return
        yield events.last(reading.num_generated, reading.num_cached)


@contextlib.asynccontextmanager
async def closing(reading: OutputStream, receive: Receive) -> AsyncIterator[None]:
    """Close the reading at the end, or as soon as the client leaves."""
    watcher = asyncio.create_task(_close_when_gone(reading, receive))
    try:
        yield
    finally:
        watcher.cancel()
        reading.close()


def usage_of(num_prompt: int, num_generated: int, num_cached: int = 0) -> JsonObject:
    """The `usage` object of an answer; `num_cached` of the prompt's ids were not read again."""
    usage: JsonObject = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
    }
    return usage | ({"prompt_tokens_details": {"cached_tokens": num_cached}} if num_cached else {})


async def _close_when_gone(reading: OutputStream, receive: Receive) -> None:
    """Not a step of the loop later: what was being sent by then was not delivered."""
    await until_gone(receive)
    reading.close()


async def until_gone(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def body_of(raw: bytes, *, more_body: bool) -> dict[str, object]:
    """A part of an answer's body, as the server below takes it."""
    return {"type": "http.response.body", "body": raw, "more_body": more_body}

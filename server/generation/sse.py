"""Server-sent events: `EventFormatter` makes a response's events, `EventStreamResponse` sends them.

Every event stream of the server is an `EventStreamResponse` of an `EventSource`: a response to a
request (`GenerationEvents`), a session's turn, or the events of a turn that another request began.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cottention.engine.outputs import FinishReason, Output
from cottention.server.generation.choice_format import ChoiceFormatter
from cottention.server.generation.json_pieces import compact
from cottention.server.generation.output_stream import OutputDelta, OutputStream, OutputStreamClosed
from cottention.server.generation.request import GenerationRequest
from cottention.server.generation.timings import timings_of
from cottention.server.http.answer_writer import AnswerWriter, answer_writer_of
from cottention.server.http.errors import ApiError, engine_failed
from cottention.server.schemas.responses import JsonObject

DONE = "data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True, slots=True)
class ResponseHeader:
    """Fields with which a response, and every chunk of a stream, begins."""

    id: str
    object: str
    created: int
    model: str


class EventFormatter:
    """Formats the events of one streamed response.

    An event is a prefix made once per request, a chunk of a choice, and a suffix.
    """

    def __init__(
        self,
        header: ResponseHeader,
        choices: ChoiceFormatter,
        request: GenerationRequest,
        stream: OutputStream,
    ) -> None:
        """stream: whose events they are, for its times."""
        self._stream = stream
        self._head = f"data: {compact(asdict(header))[:-1]},"
        self._choices = choices
        self._request = request
        self._is_slow = request.is_slow_to_format
        options = request.stream_options
        self._includes_usage = options.include_usage
        self._has_usage_in_chunks = options.include_usage and options.continuous_usage_stats
        has_null = options.include_usage and not self._has_usage_in_chunks
        self._tail = ',"usage":null}\n\n' if has_null else "}\n\n"
        self._num_tokens: Counter[int] = Counter()
        self._is_plain = not (self._has_usage_in_chunks or request.timings)
        self._around_text: dict[int, tuple[str, str]] = {}

    def write(self, index: int, output: Output, num_tokens: int, writer: AnswerWriter) -> bool:
        """Write the events of a choice's output, which is not its last; or say False.

        num_tokens: as Writer.write has it. Where events differ in nothing but their text, what is
        around it is made once.
        """
        if self._is_slow or not writer.is_ready:
            return False
        if (around := self._around_text.get(index)) is not None:
            writer.write(f"{around[0]}{quoted(output.text)}{around[1]}")
            return True
        keeps_token_ids = self._stream.keeps_token_ids
        delta = OutputDelta.of(output, num_tokens, keeps_token_ids=keeps_token_ids)
        writer.write(self.frame(self._chunks({index: delta})))
        if self._is_plain and (around := self._choices.around_text(index)) is not None:
            self._around_text[index] = f"{self._head}{around[0]}", f"{around[1]}null}}]{self._tail}"
        return True

    async def chunks(self, deltas: Mapping[int, OutputDelta]) -> list[str]:
        """The chunk of each delta, and one more for a choice that begins. Call once per delta."""
        if self._is_slow:
            return await asyncio.to_thread(self._chunks, deltas)
        return self._chunks(deltas)

    async def events(self, deltas: Mapping[int, OutputDelta]) -> AsyncIterator[bytes]:
        """The events of each delta, one choice at a time where they repeat long prompts."""
        is_end = not self._stream.has_more
        if not self._is_slow:
            yield self.frame(self._chunks(deltas), is_end=is_end).encode()
            return
        *_, last = (None, *deltas)
        for index, delta in deltas.items():
            yield await asyncio.to_thread(self._slow_events, index, delta, is_end and index == last)

    def _slow_events(self, index: int, delta: OutputDelta, is_end: bool) -> bytes:
        return self.frame(self._chunks({index: delta}), is_end=is_end).encode()

    def frame(self, chunks: Sequence[str], extra: str = "", *, is_end: bool = False) -> str:
        """Events of chunks. extra: more fields for each, as JSON that begins with a comma.

        is_end: the last of them is the last chunk of a choice in the stream.
        """
        if self._request.timings and chunks:
            return self._frame_with_timings(chunks, extra, is_end)
        head, tail = self._head, extra + self._tail
        return "".join([f"{head}{chunk}{tail}" for chunk in chunks])

    def _frame_with_timings(self, chunks: Sequence[str], extra: str, is_end: bool) -> str:
        """In every chunk, or in the last one of the stream, which may be that of the usage."""
        has_all = self._request.timings_per_token
        has_last = has_all or (is_end and not self._includes_usage)
        timings = self._timings()
        tails = [extra + (timings if has_all else "")] * (len(chunks) - 1)
        tails.append(extra + (timings if has_last else ""))
        return "".join(
            f"{self._head}{chunk}{tail}{self._tail}"
            for chunk, tail in zip(chunks, tails, strict=True)
        )

    def _timings(self) -> str:
        return f',"timings":{compact(timings_of(self._request, self._stream))}'

    def end(self) -> str:
        """The events that end a complete stream."""
        if not self._includes_usage:
            return DONE
        stream, request = self._stream, self._request
        usage = usage_of(request.num_prompt_tokens, stream.num_generated, stream.num_cached)
        timings = self._timings() if request.timings else ""
        return f'{self._head}"choices":[],"usage":{compact(usage)}{timings}}}\n\n{DONE}'

    @staticmethod
    def error(error: ApiError) -> str:
        """The event that ends a stream after an error."""
        return f"data: {error.body}\n\n"

    def _chunks(self, deltas: Mapping[int, OutputDelta]) -> list[str]:
        format_chunks = self._with_usage if self._has_usage_in_chunks else self._choices.chunks
        return [chunk for index, delta in deltas.items() for chunk in format_chunks(index, delta)]

    def _with_usage(self, index: int, delta: OutputDelta) -> Iterator[str]:
        """Chunks with the usage of their choice up to them, as in vLLM: its role has no token."""
        num_prompt_tokens = len(self._request.prompts[index // self._request.num_choices])
        *before, last = self._choices.chunks(index, delta)
        for chunk in before:
            usage = usage_of(num_prompt_tokens, self._num_tokens[index])
            yield f'{chunk},"usage":{compact(usage)}'
        self._num_tokens[index] += delta.num_tokens
        usage = usage_of(num_prompt_tokens, self._num_tokens[index])
        yield f'{last},"usage":{compact(usage)}'


@dataclass(frozen=True, slots=True)
class EventWriter:
    """A stream's `Writer` of its events."""

    formatter: EventFormatter
    answer: AnswerWriter

    def write(self, choice: int, output: Output, num_tokens: int) -> bool:
        """As Writer.write."""
        return self.formatter.write(choice, output, num_tokens, self.answer)

    def send(self) -> None:
        """As Writer.send."""
        self.answer.flush()


class Closable(Protocol):
    """Work for a client that can be ended at any time."""

    def close(self) -> None: ...


class EventSource(Closable, Protocol):
    """Where an event stream's bytes come from."""

    def events(self, idle_seconds: float) -> AsyncIterator[bytes]:
        """Unsent events, one or more at a time; no bytes after `idle_seconds` without any.

        Asking for the next ones means that the previous ones were sent. After `close` it ends or
        raises OutputStreamClosed.
        """
        ...


class EventStreamResponse(Response):
    """Sends a source's events, and comments while there are none; a disconnect closes the source.

    `send` waits while the client does not read; what comes meanwhile is merged by the source.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        source: EventSource,
        keep_alive_seconds: float,
        num_bytes: int | None = None,
        on_writer: Callable[[AnswerWriter], None] | None = None,
    ) -> None:
        """num_bytes: of all events, where that is known; there are no comments between them.

        on_writer: called when the answer has begun, where its parts may be written at once.
        """
        self.status_code = 200
        self.background = None
        length = {} if num_bytes is None else {"content-length": str(num_bytes)}
        self.init_headers(SSE_HEADERS | length)
        self._source = source
        self._keep_alive_seconds = keep_alive_seconds
        self._on_writer = on_writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with close_on_disconnect(self._source, receive):
            # Shutdown cancels streams whose clients do not read; that is no error to log.
            with contextlib.suppress(OutputStreamClosed, asyncio.CancelledError):
                await send(start)
                writer = answer_writer_of(scope)
                if self._on_writer is not None and writer is not None:
                    self._on_writer(writer)
                async for events in self._source.events(self._keep_alive_seconds):
                    await send(body_message(events or KEEP_ALIVE, more_body=True))
                await send(body_message(b"", more_body=False))


def event_stream_headers() -> list[tuple[bytes, bytes]]:
    """The headers of an event stream whose length is not known."""
    names = {"content-type": f"{EventStreamResponse.media_type}; charset=utf-8"} | SSE_HEADERS
    return [(name.lower().encode(), value.encode()) for name, value in names.items()]


class GenerationEvents:
    """The events of a request without a session."""

    def __init__(self, stream: OutputStream, formatter: EventFormatter) -> None:
        self._stream = stream
        self._formatter = formatter

    async def events(self, idle_seconds: float) -> AsyncIterator[bytes]:
        """As EventSource.events."""
        stream, formatter = self._stream, self._formatter
        while stream.has_more:
            deltas = await stream.take(idle_seconds)
            async for events in formatter.events(deltas):
                yield events
            if any(delta.finish_reason is FinishReason.ERROR for delta in deltas.values()):
                yield formatter.error(engine_failed()).encode()
                return
        yield formatter.end().encode()

    def write_with(self, writer: AnswerWriter) -> None:
        """From now on write events as their tokens come; `events` has the rest, and the end."""
        self._stream.writer = EventWriter(self._formatter, writer)

    def close(self) -> None:
        """Cancel what has not ended."""
        self._stream.close()


@contextlib.asynccontextmanager
async def close_on_disconnect(work: Closable, receive: Receive) -> AsyncIterator[None]:
    """Close `work` at the end of the block, or as soon as the client disconnects."""

    async def watch() -> None:
        # Closed in the same event loop step: what is sent after a disconnect is not delivered.
        await wait_disconnected(receive)
        work.close()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        work.close()


async def wait_disconnected(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_done(task: asyncio.Task[Any], receive: Receive) -> None:
    """Wait for a task, which is not cancelled with its caller. Raises what the task raises.

    OutputStreamClosed where the client leaves first.
    """
    leaving = asyncio.create_task(wait_disconnected(receive))
    try:
        await asyncio.wait([task, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise OutputStreamClosed
        task.result()
    finally:
        leaving.cancel()


def usage_of(num_prompt_tokens: int, num_generated: int, num_cached: int = 0) -> JsonObject:
    """The `usage` object; `num_cached` prompt tokens were restored from the prefix cache."""
    usage: JsonObject = {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt_tokens + num_generated,
    }
    return usage | ({"prompt_tokens_details": {"cached_tokens": num_cached}} if num_cached else {})


def body_message(raw: bytes, *, more_body: bool) -> dict[str, object]:
    """An ASGI message with a part of a response's body."""
    return {"type": "http.response.body", "body": raw, "more_body": more_body}

"""The response to a request that is a turn of a session.

The turn begins, runs and ends while the response is sent, so that a session keeps of an interrupted
turn what was written to the socket. With `on_disconnect` "continue" it runs in a task of its own.
"""

from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cottention.engine.scheduling.client import Client
from cottention.server.api.dependencies import Context
from cottention.server.generation.cancellation import Cancellation
from cottention.server.generation.deadline import entered_before
from cottention.server.generation.output_stream import OutputDelta, OutputStream
from cottention.server.generation.request import GenerationRequest, ParsedRequest
from cottention.server.generation.responses import (
    EndpointFormat,
    check_outcome,
    collect_outputs,
    format_response,
)
from cottention.server.generation.sse import (
    EventFormatter,
    EventStreamResponse,
    close_on_disconnect,
    until_done,
    usage_of,
)
from cottention.server.generation.timings import timings_of
from cottention.server.limits.rate_limit import client_of, track
from cottention.server.observability.access_log import RequestRecord, request_record
from cottention.server.schemas.session_responses import etag_of, session_summary
from cottention.server.sessions.live_events import LiveEventFollower, LiveEvents
from cottention.server.sessions.turn import RunningTurn
from cottention.server.sessions.turn_events import TurnEvents
from cottention.server.sessions.turn_queue import Caller

if TYPE_CHECKING:  # it imports torch, which the server must not load
    from cottention.engine.sessions.types import Session


class TurnResponse(Response):
    """Begins the turn, runs it, sends its output whole or as events, and ends it."""

    def __init__(
        self,
        context: Context,
        parsed: ParsedRequest,
        endpoint: EndpointFormat,
        name: str,
        caller: Caller,
        deadline: float | None,
        cancellation: Cancellation,
    ) -> None:
        """name: the response's id. deadline: by the event loop's clock."""
        self.background = None
        self._context = context
        self._parsed = parsed
        self._endpoint = endpoint
        self._name = name
        self._caller = caller
        self._deadline = deadline
        self._cancellation = cancellation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; an exception before the first byte becomes an error response."""
        context, options = self._context, self._parsed.turn
        assert options is not None
        request_record(scope).session_id = options.session_id
        async with AsyncExitStack() as stack:
            stack.callback(self._cancellation.end)
            turns = context.turns.turn(self._caller, options, receive, self._cancellation)
            in_time = self._cancellation.entered(entered_before(self._deadline, turns))
            turn = await stack.enter_async_context(in_time)
            request, stream = await self._generate(turn, client_of(scope))
            self._cancellation.attach(stream)
            track(scope, request, stream)
            stack.callback(stream.close)
            if options.on_disconnect == "continue":
                response = await self._continued(
                    request, stream, turn, stack.pop_all(), request_record(scope), receive
                )
            elif request.is_stream:
                events = TurnEvents(stream, self._formatter(request, stream), turn)
                response = EventStreamResponse(events, context.config.sse_keep_alive_seconds)
            else:
                response = await self._whole(request, stream, turn, receive)
            await response(scope, receive, send)

    async def _generate(
        self, turn: RunningTurn, client: Client
    ) -> tuple[GenerationRequest, OutputStream]:
        """Build the turn's request from its session's state, and submit it."""
        context = self._context
        policies, tokenizer = context.policies, context.tokenizer
        start = policies.settled(turn.state, self._parsed.params)
        request = self._parsed.build_turn(start, tokenizer)
        num_reread = policies.num_reread(start, request.num_prompt_tokens)
        request = replace(request, num_reread=num_reread, num_held=start.num_tokens)
        skips = request.params.skip_special_tokens
        table = tokenizer.token_bytes if skips else tokenizer.written_bytes
        turn.set_prompt(start, request.prompts[0], table, policies.window)
        stream = await context.engine.generate(
            self._name, request, start=start, deadline=self._deadline, client=client
        )
        return request, stream

    async def _whole(
        self, request: GenerationRequest, stream: OutputStream, turn: RunningTurn, receive: Receive
    ) -> Response:
        """If the client disconnects before the end, nothing of the turn is kept."""
        async with close_on_disconnect(stream, receive):
            deltas = await collect_outputs(stream)
            session = await turn.finish(deltas[0])
            return await self._formatted(request, deltas[0], stream, session)

    async def _continued(
        self,
        request: GenerationRequest,
        stream: OutputStream,
        turn: RunningTurn,
        stack: AsyncExitStack,
        record: RequestRecord,
        receive: Receive,
    ) -> Response:
        """Run the turn in a task of its own, which closes `stack`; the client may follow it."""
        context, is_whole = self._context, not request.is_stream
        live = LiveEvents(context.config.session_event_log_bytes)
        events = TurnEvents(
            stream, self._formatter(request, stream), turn, live.log_ending_with, gathers=is_whole
        )
        key = (self._caller.owner, turn.session_id)
        record.background_turn = task = context.turns.detach(key, live, _run(events, live, stack))
        if not is_whole:
            follower = LiveEventFollower(live, 0)
            return EventStreamResponse(follower, context.config.sse_keep_alive_seconds)
        await until_done(task, receive)
        if events.error is not None:
            raise events.error
        assert events.session is not None
        check_outcome(stream, {0: events.whole})
        return await self._formatted(request, events.whole, stream, events.session)

    async def _formatted(
        self,
        request: GenerationRequest,
        delta: OutputDelta,
        stream: OutputStream,
        session: "Session",
    ) -> Response:
        """The whole response."""
        endpoint, context = self._endpoint, self._context
        header = endpoint.header(self._name, context.model_name, is_stream=request.is_stream)
        choices = endpoint.formatter(request, context.tokenizer)
        usage = usage_of(request.num_prompt_tokens, stream.num_generated)
        extra = {"session": session_summary(session)}
        if request.timings:
            extra["timings"] = timings_of(request, stream)
        response = format_response({0: delta}, header, choices, request, usage, extra)
        response.headers["ETag"] = etag_of(session)
        return response

    def _formatter(self, request: GenerationRequest, stream: OutputStream) -> EventFormatter:
        endpoint, context = self._endpoint, self._context
        header = endpoint.header(self._name, context.model_name, is_stream=True)
        choices = endpoint.formatter(request, context.tokenizer)
        return EventFormatter(header, choices, request, stream)


async def _run(events: TurnEvents, live: LiveEvents, stack: AsyncExitStack) -> None:
    """Run a turn to its end and pass its events to `live`; then close `stack`."""
    try:
        async with stack:
            async for text in events.texts():
                live.add(text)
                if events.has_ended:  # followers need not wait until the stack is closed
                    live.end()
    finally:
        live.end()

"""The response to a request that is a session's turn; the turn runs while it is sent.

A turn ends with its client, and its session then keeps the text that was written to the socket;
or it is detached, runs to its end, and its events can be followed.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cottention.server.api.dependencies import Context
from cottention.server.generation.output_stream import OutputDelta, OutputStream
from cottention.server.generation.request import GenerationRequest, TurnOptions, in_session
from cottention.server.generation.responses import EndpointFormat, told_whole, whole_pieces
from cottention.server.generation.sse import Events, EventStream, closing, usage_of
from cottention.server.http.errors import expired
from cottention.server.limits.rate_limit import track
from cottention.server.observability.access_log import RequestRecord, request_record
from cottention.server.schemas.session_responses import etag_of, shape_in_answer
from cottention.server.sessions.live_events import LiveEventResponse, LiveEvents
from cottention.server.sessions.turn import RunningTurn
from cottention.server.sessions.turn_events import TurnEvents
from cottention.server.sessions.turn_queue import Caller, until_done

if TYPE_CHECKING:  # it brings torch with it, which the server does not know
    from cottention.engine.sessions.types import Session


class TurnResponse(Response):
    """Begins a turn, sends its output whole or as events, and ends it."""

    def __init__(
        self,
        context: Context,
        order: GenerationRequest,
        kind: EndpointFormat,
        name: str,
        caller: Caller,
    ) -> None:
        self.background = None
        self._context = context
        self._order = order
        self._kind = kind
        self._name = name
        self._caller = caller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. An error before the first byte is raised, and answered as such."""
        context, terms = self._context, self._order.turn
        assert isinstance(terms, TurnOptions)
        policies = context.bridge.engine.policies
        async with AsyncExitStack() as stack:
            begun = context.turns.turn(self._caller, terms, receive)
            turn = await _in_time(stack.enter_async_context(begun), self._order.deadline)
            start = policies.settled(turn.state, self._order.params)
            tokenizer = context.bridge.engine.tokenizer
            self._order = in_session(self._order, start, tokenizer)
            order = replace(self._order, start=start)
            skips = order.params.skip_special_tokens
            table = tokenizer.token_bytes if skips else tokenizer.written_bytes
            turn.set_prompt(start, order.prompts[0], table, policies.window)
            reading = await context.bridge.open(self._name, order)
            track(scope, order, reading)
            stack.callback(reading.close)
            if terms.on_disconnect == "continue":
                work = reading, turn, stack.pop_all()
                answer = await self._continued(*work, request_record(scope), receive)
            elif order.is_stream:
                told = TurnEvents(reading, self._events(), turn)
                answer = TurnStream(reading, told, context.config.sse_keep_alive_seconds)
            else:
                answer = await self._whole(reading, turn, receive)
            await answer(scope, receive, send)

    async def _whole(self, reading: OutputStream, turn: RunningTurn, receive: Receive) -> Response:
        """Where the client leaves before the end, the turn is undone."""
        async with closing(reading, receive):
            pieces = await whole_pieces(reading)
            session = await turn.finish(pieces[0])
            return await self._told(pieces[0], reading.num_generated, session)

    async def _continued(
        self,
        reading: OutputStream,
        turn: RunningTurn,
        stack: AsyncExitStack,
        record: RequestRecord,
        receive: Receive,
    ) -> Response:
        """Detach the turn, which closes `stack` at its end; its client follows it."""
        context, is_whole = self._context, not self._order.is_stream
        live = LiveEvents(context.config.session_event_log_bytes)
        told = TurnEvents(reading, self._events(), turn, live.log_ending_with, gathers=is_whole)
        key = (self._caller.owner, turn.session_id)
        record.background_turn = going = context.turns.detach(key, live, _tell(told, live, stack))
        if not is_whole:
            return LiveEventResponse(live, 0, context.config.sse_keep_alive_seconds)
        await until_done(going, receive)
        if told.error is not None:
            raise told.error
        assert told.session is not None
        return await self._told(told.whole, reading.num_generated, told.session)

    async def _told(self, piece: OutputDelta, num_generated: int, session: "Session") -> Response:
        """The whole response."""
        order, kind, context = self._order, self._kind, self._context
        heading = kind.heading(self._name, order, context.model_name)
        choices = kind.choices(order, context.bridge.engine.tokenizer)
        usage = usage_of(order.num_prompt, num_generated)
        more = {"session": shape_in_answer(session)}
        told = await told_whole({0: piece}, heading, choices, order, usage, more)
        told.headers["ETag"] = etag_of(session)
        return told

    def _events(self) -> Events:
        order, kind = replace(self._order, is_stream=True), self._kind
        heading = kind.heading(self._name, order, self._context.model_name)
        return Events(heading, kind.choices(order, self._context.bridge.engine.tokenizer), order)


async def _in_time(begins: Awaitable[RunningTurn], deadline: float | None) -> RunningTurn:
    """The turn, if it begins by then. Raises ApiError 504."""
    try:
        async with asyncio.timeout_at(deadline):
            return await begins
    except TimeoutError:
        raise expired() from None


class TurnStream(EventStream):
    """Sends a turn's events; the turn ends with its client."""

    def __init__(self, reading: OutputStream, told: TurnEvents, keep_alive: float) -> None:
        super().__init__(reading, told.events, keep_alive)
        self._told = told

    def _texts(self) -> AsyncIterator[str]:
        return self._told.texts(self._keep_alive)


async def _tell(told: TurnEvents, live: LiveEvents, stack: AsyncExitStack) -> None:
    """Add all events of a turn to `live`; then close `stack`, which frees the session."""
    try:
        async with stack:
            async for text in told.texts():
                live.add(text)
                if told.has_ended:  # at once, before the stack is closed
                    live.end()
    finally:
        live.end()

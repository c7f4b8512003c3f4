"""The answer to a request that is a session's turn: all of it happens while it is sent.

Owns that the session has moved before its client is told so, and that it keeps of a cut turn what
was written to the socket. Knows nothing of bodies.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.errors import SessionError
from engine.outputs import FinishReason
from server.accounts import note
from server.choices import Choices, compact
from server.context import Context
from server.errors import engine_failed, expired, of_session
from server.open_turn import OpenTurn
from server.orders import Order, TurnTerms
from server.reading import Reading
from server.session_answers import etag_of, shape_in_answer
from server.streaming import KEEP_ALIVE, Events, EventStream, Heading, closing, usage_of
from server.telling import told_whole, whole_pieces
from server.turns import Asker

if TYPE_CHECKING:  # it brings torch with it, which the server does not know
    from engine.session import Session


class TurnAnswer(Response):
    """Begins the turn, runs it, tells it whole or as events, and ends it."""

    def __init__(
        self, context: Context, order: Order, heading: Heading, choices: Choices, asker: Asker
    ) -> None:
        self.background = None
        self._context = context
        self._order = order
        self._heading = heading
        self._choices = choices
        self._asker = asker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; what is raised before the first byte becomes an error's answer."""
        context, terms = self._context, self._order.turn
        assert isinstance(terms, TurnTerms)
        waited_for = context.turns.turn(self._asker, terms, receive)
        async with _by(self._order.deadline, waited_for) as turn:
            order = replace(self._order, start=turn.state)
            tokenizer, skips = context.bridge.engine.tokenizer, order.params.skip_special_tokens
            table = tokenizer.token_bytes if skips else tokenizer.written_bytes
            turn.reads(order.prompts[0], table, context.trained_length)
            reading = await context.bridge.open(self._heading.id, order)
            note(scope, order, reading)
            if order.is_stream:
                events = TurnEvents(self._heading, self._choices, order)
                seconds = context.config.keep_alive_seconds
                await TurnStream(reading, events, seconds, turn)(scope, receive, send)
            else:
                await (await self._whole(reading, turn, receive))(scope, receive, send)

    async def _whole(self, reading: Reading, turn: OpenTurn, receive: Receive) -> Response:
        """A client that left before the end has nothing of the turn, and the session neither."""
        async with closing(reading, receive):
            pieces = await whole_pieces(reading)
            session = await turn.finish(pieces[0])
            more = {"session": shape_in_answer(session)}
            order = self._order
            usage = usage_of(order.num_prompt, reading.num_generated)
            told = await told_whole(pieces, self._heading, self._choices, order, usage, more)
            told.headers["ETag"] = etag_of(session)
            return told


@contextlib.asynccontextmanager
async def _by(
    deadline: float | None, turn: contextlib.AbstractAsyncContextManager[OpenTurn]
) -> AsyncIterator[OpenTurn]:
    """The turn, if it begins in time. Raises ApiError 504."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            async with asyncio.timeout_at(deadline):
                begun = await stack.enter_async_context(turn)
        except TimeoutError:
            raise expired() from None
        yield begun


class TurnEvents(Events):
    """Events of a turn; the one with the end has the session beside its choice."""

    session = ""

    def ends_in(self, session: "Session") -> None:
        """What the session is, once the turn has ended."""
        self.session = f',"session":{compact(shape_in_answer(session))}'

    def _tail(self, num_generated: int) -> str:
        return self.session + super()._tail(num_generated)


class TurnStream(EventStream):
    """Sends a turn as events, and notes what was sent."""

    def __init__(
        self, reading: Reading, events: TurnEvents, keep_alive: float, turn: OpenTurn
    ) -> None:
        super().__init__(reading, events, keep_alive)
        self._turn_events = events
        self._turn = turn

    async def _texts(self) -> AsyncIterator[str]:
        reading, events, turn = self._reading, self._turn_events, self._turn
        while reading.has_more:
            pieces = await reading.take(self._keep_alive)
            piece = pieces.get(0)
            if piece is not None and piece.finish_reason:
                try:
                    events.ends_in(await turn.finish(piece))
                except SessionError as error:
                    yield events.error(of_session(error))
                    return
            yield await events.worded(pieces, reading.num_generated) or KEEP_ALIVE
            if piece is not None and not reading.is_closed:
                turn.delivered(piece)
            if piece is not None and piece.finish_reason is FinishReason.ERROR:
                yield events.error(engine_failed())
                return
        yield events.last(reading.num_generated)

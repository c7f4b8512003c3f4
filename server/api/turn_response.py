"""The response to a request that is a turn of a session.

The turn begins, runs and ends while the response is sent, so that a session keeps of an interrupted
turn what was written to the socket. With `on_disconnect` "continue" it runs in a task of its own.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from cottention.engine.scheduling.client import Client
from cottention.engine.sessions.store.journal import JournaledTurn
from cottention.engine.sessions.store.protocol import Claim
from cottention.server.api.dependencies import Context
from cottention.server.api.journaled import can_go_on, left_to_others, new_journaled, repeatable
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
    ResponseHeader,
    close_on_disconnect,
    event_stream_headers,
    until_done,
    usage_of,
)
from cottention.server.generation.timings import timings_of
from cottention.server.http.errors import unavailable
from cottention.server.idempotency.keys import KeyedRequest, ResponseOnce, keyed_request_of
from cottention.server.idempotency.recording import encode_answer
from cottention.server.limits.rate_limit import client_of, track
from cottention.server.observability.access_log import RequestRecord, request_record
from cottention.server.schemas.session_responses import etag_of, session_summary
from cottention.server.sessions.journal import JournalWriter, TurnJournal
from cottention.server.sessions.live_events import LiveEventFollower, LiveEvents
from cottention.server.sessions.turn import RunningTurn
from cottention.server.sessions.turn_events import TurnEvents
from cottention.server.sessions.turn_queue import Caller

if TYPE_CHECKING:  # it imports torch, which the server must not load
    from cottention.engine.sessions.types import AdoptedTurn, Session, SessionAnswer


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
        self._journaled: JournaledTurn | None = None
        self._known: AdoptedTurn | None = None

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
            keyed = keyed_request_of(scope)
            goes_on = options.on_disconnect == "continue" or keyed is not None
            params = self._parsed.params
            if goes_on and can_go_on(context, params):
                self._journaled = new_journaled(
                    *(scope, context, self._caller.owner, self._name, self._deadline),
                    params.seed,
                    keyed,
                )
            request, stream = await self._generate(turn, client_of(scope))
            self._cancellation.attach(stream)
            track(scope, request, stream)
            stack.callback(stream.close)
            if goes_on:
                response = await self._continued(
                    request, stream, turn, stack.pop_all(), request_record(scope), receive, keyed
                )
            elif request.is_stream:
                events = TurnEvents(stream, self._formatter(request, stream), turn)
                keep_alive = context.config.sse_keep_alive_seconds
                response = EventStreamResponse(events, keep_alive, on_writer=events.write_with)
            else:
                response = await self._whole(request, stream, turn, receive)
            await response(scope, receive, send)

    async def go_on(self, adopted: "AdoptedTurn", record: RequestRecord) -> None:
        """Go on with a turn that another server has begun; returns when its events can be followed.

        The stream of its idempotency key, if it has one, is followed to its end in a task.
        """
        context, options, entry = self._context, self._parsed.turn, adopted.journaled
        assert options is not None
        self._journaled, self._known = entry, adopted
        keyed = None
        if entry.key is not None and entry.token is not None:
            keyed = context.keys.follow(Claim(entry.owner, entry.key, entry.token))
        scope: Scope = {"type": "http", "state": {"owner": entry.owner}}
        async with AsyncExitStack() as stack:
            stack.callback(self._cancellation.end)
            turns = context.turns.adopted(adopted.turn, options.on_cancel, self._cancellation)
            turn = await stack.enter_async_context(turns)
            request, stream = await self._generate(turn, Client(entry.owner))
            self._cancellation.attach(stream)
            stack.callback(stream.close)
            record.add(request, stream)
            begun = asyncio.Event()
            response = self._continued(
                request, stream, turn, stack.pop_all(), record, never, keyed, begun
            )
            task = (
                context.turns.spawn(_respond(response))
                if keyed is None
                else context.keys.record(keyed, scope, response)
            )
            waiting = asyncio.create_task(begun.wait())
            await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()

    async def _generate(
        self, turn: RunningTurn, client: Client
    ) -> tuple[GenerationRequest, OutputStream]:
        """Build the turn's request from its session's state, and submit it."""
        context = self._context
        policies, tokenizer = context.policies, context.tokenizer
        start = policies.settled(turn.state, self._parsed.params)
        request = self._parsed.build_turn(start, tokenizer, policies)
        replayed: Sequence[int] | None = None
        if self._journaled is not None:
            request, replayed = repeatable(request, self._journaled, self._known)
        skips = request.params.skip_special_tokens
        table = tokenizer.token_bytes if skips else tokenizer.written_bytes
        turn.set_prompt(start, request.prompts[0], table, policies.window)
        stream = await context.engine.generate(
            self._name,
            request,
            start=start,
            deadline=self._deadline,
            client=client,
            replayed=replayed,
        )
        return request, stream

    async def _whole(
        self, request: GenerationRequest, stream: OutputStream, turn: RunningTurn, receive: Receive
    ) -> Response:
        """If the client disconnects before the end, nothing of the turn is kept."""
        async with close_on_disconnect(stream, receive):
            deltas = await collect_outputs(stream)
            session = await turn.finish(deltas[0])
            header = self._header(is_stream=False)
            return self._formatted(request, deltas[0], stream, session, header, at_once=False)

    async def _continued(
        self,
        request: GenerationRequest,
        stream: OutputStream,
        turn: RunningTurn,
        stack: AsyncExitStack,
        record: RequestRecord,
        receive: Receive,
        keyed: KeyedRequest | None,
        begun: asyncio.Event | None = None,
    ) -> Response:
        """Run the turn in a task of its own, which closes `stack`; the client may follow it.

        keyed: its answer is stored with the turn. begun: set when its events can be followed.
        """
        context, is_whole = self._context, not request.is_stream
        entry, known = self._journaled, self._known
        live = LiveEvents(
            context.config.session_event_log_bytes, None if entry is None else entry.turn
        )
        header = self._header(is_stream=False)

        def respond(sessions: "list[Session]") -> Response:
            return self._formatted(request, events.whole, stream, sessions[0], header, at_once=True)

        once = ResponseOnce(keyed, respond)

        def answer(last_events: Callable[[], str]) -> "SessionAnswer | None":
            if keyed is None or is_whole:
                return once.answer
            return keyed.session_answer(lambda _: told(live, last_events()))

        if keyed is not None:
            turn.is_whole_or_undone = True
            if not is_whole:
                live.keep_all(context.config.idempotency_bytes)
        journal = None
        if entry is not None and context.journal is not None:
            try:
                journal = await self._open_journal(context.journal, turn, stream)
            except BaseException:
                await stack.aclose()
                raise
        if known is not None:
            live.add(known.events.decode())
        events = TurnEvents(
            stream,
            self._formatter(request, stream),
            turn,
            live.log_ending_with,
            answer,
            gathers=is_whole,
            journal=journal,
            num_known=0 if known is None else len(known.ids),
        )
        key = (self._caller.owner, turn.session_id)
        work = _run(events, live, stack, turn, journal, keyed)
        record.background_turn = task = context.turns.detach(key, live, work)
        if keyed is not None:
            keyed.turn = task
        if begun is not None:
            begun.set()
        if not is_whole:
            follower = LiveEventFollower(live, 0)
            return EventStreamResponse(follower, context.config.sse_keep_alive_seconds)
        await until_done(task, receive)
        if events.error is not None:
            raise events.error
        if live.was_cut:
            raise unavailable("the turn goes on at another server: follow its session's events")
        assert events.session is not None
        check_outcome(stream, {0: events.whole})
        if keyed is not None:
            return once.respond([events.session])
        return self._formatted(request, events.whole, stream, events.session, header, at_once=False)

    async def _open_journal(
        self, writer: JournalWriter, turn: RunningTurn, stream: OutputStream
    ) -> TurnJournal:
        assert self._journaled is not None
        if self._known is not None:
            return writer.go_on(turn.lease, stream.close)
        return await writer.begin(turn.lease, self._journaled, stream.close)

    def _header(self, *, is_stream: bool) -> ResponseHeader:
        """The same for a turn that another server has begun."""
        header = self._endpoint.header(self._name, self._context.model_name, is_stream=is_stream)
        return (
            header if self._journaled is None else replace(header, created=self._journaled.created)
        )

    def _formatted(
        self,
        request: GenerationRequest,
        delta: OutputDelta,
        stream: OutputStream,
        session: "Session",
        header: ResponseHeader,
        *,
        at_once: bool,
    ) -> Response:
        """The whole response."""
        endpoint, context = self._endpoint, self._context
        choices = endpoint.formatter(request, context.tokenizer)
        usage = usage_of(request.num_prompt_tokens, stream.num_generated)
        extra = {"session": session_summary(session)}
        if request.timings:
            extra["timings"] = timings_of(request, stream)
        response = format_response(
            {0: delta}, header, choices, request, usage, extra, at_once=at_once
        )
        response.headers["ETag"] = etag_of(session)
        return response

    def _formatter(self, request: GenerationRequest, stream: OutputStream) -> EventFormatter:
        endpoint, context = self._endpoint, self._context
        choices = endpoint.formatter(request, context.tokenizer)
        return EventFormatter(self._header(is_stream=True), choices, request, stream)


def told(live: LiveEvents, last_events: str) -> bytes:
    """The answer that has all events of a turn; one that says so where they are too long."""
    headers = event_stream_headers()
    body = live.all_ending_with(last_events)
    return encode_answer(0 if body is None else 200, headers, body or b"")


def _note_kept(keyed: KeyedRequest | None, events: TurnEvents) -> None:
    """The turn's answer is stored with it, if the turn was."""
    if keyed is not None and events.session is not None and events.error is None:
        keyed.is_kept = events.session.is_durable


async def never() -> Message:
    """What a client sends that does not leave."""
    await asyncio.Event().wait()
    raise AssertionError


async def _respond(response: Awaitable[Response]) -> None:
    """Make a response that nobody waits for; the client of its turn has left."""
    with contextlib.suppress(Exception):  # it is for that client
        await response


async def _run(
    events: TurnEvents,
    live: LiveEvents,
    stack: AsyncExitStack,
    turn: RunningTurn,
    journal: TurnJournal | None,
    keyed: KeyedRequest | None,
) -> None:
    """Run a turn to its end and pass its events to `live`; then close `stack`."""
    try:
        async with stack, left_to_others(journal, turn.leave, live, keyed):
            async for text in events.texts():
                live.add(text)
                if events.has_ended:  # followers need not wait until the stack is closed
                    _note_kept(keyed, events)
                    live.end()
    finally:
        live.end()
        if journal is not None:
            journal.close()

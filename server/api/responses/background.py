"""Responses in the background: they run to their end without their client, and their server."""

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from fastapi import Response

from cottention.engine.scheduling.client import Client
from cottention.engine.sessions.store.protocol import Claim
from cottention.server.api.dependencies import Context
from cottention.server.api.journaled import left_to_others
from cottention.server.api.responses.begun import (
    Asked,
    BegunResponse,
    ParsedResponse,
    begin_response,
)
from cottention.server.api.turn_response import told
from cottention.server.generation.cancellation import Cancellation
from cottention.server.generation.json_pieces import object_response
from cottention.server.generation.sse import EventStreamResponse
from cottention.server.idempotency.keys import KeyedRequest
from cottention.server.idempotency.recording import answer_of
from cottention.server.observability.access_log import RequestRecord
from cottention.server.responses.values import response_id_of, response_owner
from cottention.server.sessions.journal import TurnJournal
from cottention.server.sessions.live_events import LiveEventFollower, LiveEvents

if TYPE_CHECKING:  # they import torch, which the server must not load
    from cottention.engine.sessions.types import AdoptedTurn, SessionAnswer
    from cottention.engine.state.session_state import SessionState


async def begin_alone(
    context: Context,
    asked: Asked,
    begun: BegunResponse,
    start: "SessionState",
    keyed: KeyedRequest | None,
) -> "tuple[Response, asyncio.Task[None]]":
    """Keep a response that has begun, and run it in a task; its answer, and the task.

    Raises ApiError and SessionError; then nothing is left of it.
    """
    try:
        turn = await begun.run.keep_begun(start)
        journal = None
        if context.journal is not None and asked.entry is not None:
            journal = await context.journal.begin(turn.lease, asked.entry, begun.stream.close)
    except BaseException:
        await begun.run.forget()
        await begun.stack.aclose()
        raise
    return _detach(context, asked, begun, journal, keyed)


async def go_on(
    context: Context,
    parsed: ParsedResponse,
    adopted: "AdoptedTurn",
    deadline: float | None,
    cancellation: Cancellation,
    record: RequestRecord,
) -> None:
    """Go on with a response that another server has begun; returns when it can be followed here.

    Raises what a request of the same body raises.
    """
    entry, turn = adopted.journaled, adopted.turn
    asked = Asked(
        owner=entry.owner,
        name=entry.name,
        parsed=parsed,
        response_id=response_id_of(turn.session.id),
        created=entry.created,
        deadline=deadline,
        client=Client(entry.owner),
        cancellation=cancellation,
        entry=entry,
        known=adopted,
    )
    start = context.policies.settled(turn.state, parsed.chat.params)
    begun = await begin_response(context, asked, start)
    begun.run.go_on(adopted)
    assert context.journal is not None
    journal = context.journal.go_on(turn.lease, begun.stream.close)
    keyed = None
    if entry.key is not None and entry.token is not None:
        keyed = context.keys.follow(Claim(entry.owner, entry.key, entry.token))
    record.add(begun.request, begun.stream)
    response, record.background_turn = _detach(context, asked, begun, journal, keyed)
    if keyed is not None:

        async def answered() -> Response:
            return response

        context.keys.record(keyed, {"type": "http", "state": {"owner": entry.owner}}, answered())


def _detach(
    context: Context,
    asked: Asked,
    begun: BegunResponse,
    journal: TurnJournal | None,
    keyed: KeyedRequest | None,
) -> "tuple[Response, asyncio.Task[None]]":
    run, live = begun.run, begun.running.live
    assert live is not None
    is_stream = asked.parsed.body.stream
    first = object_response(begun.writer.snapshot(), is_long=False)
    if journal is not None:
        run.journal_with(journal)
    if keyed is not None:
        if is_stream:
            live.keep_all(context.config.idempotency_bytes)

        def answer(last_events: str) -> "SessionAnswer":
            kept = told(live, last_events) if is_stream else answer_of(first)
            return keyed.session_answer(lambda _: kept)

        run.answer_with(answer)
    key = response_owner(asked.owner), asked.response_id
    task = context.turns.detach(key, live, _run(begun, live, journal, keyed))
    if keyed is not None:
        keyed.turn, keyed.is_early = task, not is_stream
    if is_stream:
        follower = LiveEventFollower(live, 0)
        return EventStreamResponse(follower, context.config.sse_keep_alive_seconds), task
    return first, task


async def _run(
    begun: BegunResponse,
    live: LiveEvents,
    journal: TurnJournal | None,
    keyed: KeyedRequest | None,
) -> None:
    """Run a response to its end. keyed: is told what became of it."""
    run, has_failed = begun.run, True
    try:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(begun.stack.aclose)
            stack.push_async_callback(run.settle)
            async with left_to_others(journal, run.leave, live, keyed):
                async for text in run.texts():
                    live.add(text)
                has_failed = run.error is not None
                if keyed is not None:
                    keyed.is_kept = run.is_answered
    finally:
        live.end()
        if keyed is not None:
            keyed.has_failed = has_failed and not live.was_cut
        if journal is not None:
            journal.close()

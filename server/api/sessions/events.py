"""GET /v1/sessions/ID/events: the events of a turn that runs, or ran, without its client.

While the turn runs its events are followed to its end; afterwards the session keeps the last ones.
"""

import re
from contextlib import ExitStack
from typing import Annotated, NamedTuple

from fastapi import APIRouter, Header, Request, Response

from cottention.server.api.dependencies import ContextDep, elsewhere, reading
from cottention.server.api.openapi import EVENTS, error_responses
from cottention.server.generation.sse import EventStreamResponse
from cottention.server.http.body import shown
from cottention.server.http.errors import invalid
from cottention.server.limits.rate_limit import counting_read
from cottention.server.sessions.live_events import LiveEventFollower, StoredEvents, gone
from cottention.server.sessions.store_threads import in_store_thread
from cottention.server.sessions.turn_queue import owner_of

router = APIRouter()

EVENT_ID = re.compile(r"([0-9a-f]{16})-(\d{1,18})")
NO_EVENTS = {"description": "There are no later events, and none will come."}


class EventId(NamedTuple):
    """The turn of an event, and the event's number in the turn."""

    turn: str
    number: int


@router.get(
    "/v1/sessions/{session_id}/events",
    response_class=Response,
    responses=error_responses(400, 401, 404, 409, 410, 429, 500, 503, 507)
    | {200: {"content": EVENTS}, 204: NO_EVENTS},
)
async def follow_events(
    session_id: str,
    request: Request,
    context: ContextDep,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """Events of the session's last turn: those after Last-Event-ID, or all that are log."""
    owner, last = owner_of(request), _event_id(last_event_id)
    live = context.turns.live_events(owner, session_id)
    if live is None:
        found = await elsewhere(
            request,
            context,
            session_id,
            lambda: context.turns.live_events(owner, session_id) is not None,
        )
        if found is not None:
            return found
        live = context.turns.live_events(owner, session_id)
    if live is not None and (last is None or last.turn == live.turn):
        if last is not None and live.may_come(last.number):
            number = last.number + 1
        else:
            number = _next(last, live.turn, live.first, live.stop)
        if live.has_ended and number == live.stop:
            return Response(status_code=204)
        with ExitStack() as stack:
            if (
                live.is_followed
            ):  # the first follower stands for the turn's client, which is counted
                stack.enter_context(counting_read(request.scope))
            follower = LiveEventFollower(live, number, stack.pop_all().close)
        return EventStreamResponse(follower, context.config.sse_keep_alive_seconds)
    with ExitStack() as stack:
        stack.enter_context(reading(request, context))
        log = await in_store_thread(context.sessions.events, owner, session_id)
        number = _next(last, log.turn, log.first, log.first + len(log.events))
        if number == log.first + len(log.events):
            return Response(status_code=204)
        stored = StoredEvents(log, number, stack.pop_all().close)
    return EventStreamResponse(stored, context.config.sse_keep_alive_seconds, stored.num_bytes)


def _event_id(text: str | None) -> EventId | None:
    if not text:
        return None
    found = EVENT_ID.fullmatch(text)
    if found is None:
        message = "Last-Event-ID must be the id of an event of this session"
        raise invalid("Last-Event-ID", f"{message}; it is {shown(text)}")
    return EventId(found[1], int(found[2]))


def _next(last: EventId | None, turn: str, first: int, stop: int) -> int:
    """The number of the next event to send, first <= number <= stop. Raises ApiError."""
    if last is None:
        return first
    if last.turn != turn:
        raise gone("that event is of another turn than the one whose events are kept")
    if last.number >= stop:
        message = f"no event with that id has been sent; the next is {turn}-{stop}"
        raise invalid("Last-Event-ID", message)
    if last.number + 1 < first:
        raise gone(f"events are only kept from {turn}-{first} on; some that were missed are gone")
    return last.number + 1

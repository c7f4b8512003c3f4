"""/v1/sessions/ID/events: the events of a turn that does not end with its client.

The events of a running turn are followed to its end; those of a turn that has ended are read from
the session's event log. Last-Event-ID says after which event to continue.
"""

import asyncio
import re
from typing import Annotated, NamedTuple

from fastapi import APIRouter, Header, Request, Response

from cottention.server.api.dependencies import ContextDep
from cottention.server.api.openapi import EVENTS, refusals
from cottention.server.generation.sse import SSE_HEADERS
from cottention.server.http.errors import invalid
from cottention.server.sessions.live_events import LiveEventResponse, gone, with_ids
from cottention.server.sessions.turn_queue import owner_of

router = APIRouter()

EVENT_ID = re.compile(r"([0-9a-f]{16})-(\d{1,18})")
NOTHING = {"description": "No event was missed, and no more will come."}


class EventId(NamedTuple):
    """An event's turn, and its number in it."""

    turn: str
    number: int


@router.get(
    "/v1/sessions/{session_id}/events",
    response_class=Response,
    responses=refusals(400, 401, 404, 409, 410, 500) | {200: {"content": EVENTS}, 204: NOTHING},
)
async def follow_events(
    session_id: str,
    request: Request,
    context: ContextDep,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """The events of the session's last turn after Last-Event-ID, or all that are kept."""
    owner, last = owner_of(request), _event_id(last_event_id)
    live = context.turns.live_events(owner, session_id)
    if live is not None and (last is None or last.turn == live.turn):
        number = _next(last, live.turn, live.first, live.stop)
        if live.has_ended and number == live.stop:
            return Response(status_code=204)
        return LiveEventResponse(live, number, context.config.sse_keep_alive_seconds)
    log = await asyncio.to_thread(context.sessions.events, owner, session_id)
    number = _next(last, log.turn, log.first, log.first + len(log.events))
    missed = log.events[number - log.first :]
    if not missed:
        return Response(status_code=204)
    raw = with_ids(log.turn, number, missed)
    return Response(raw, media_type="text/event-stream", headers=SSE_HEADERS)


def _event_id(text: str | None) -> EventId | None:
    if not text:
        return None
    found = EVENT_ID.fullmatch(text)
    if found is None:
        raise invalid("Last-Event-ID", "Last-Event-ID must be the id of an event of this session")
    return EventId(found[1], int(found[2]))


def _next(last: EventId | None, turn: str, first: int, stop: int) -> int:
    """The number of the event to continue with, first <= number <= stop. Raises ApiError."""
    if last is None:
        return first
    if last.turn != turn:
        raise gone("that event is not of the turn whose events the session keeps")
    if last.number >= stop:
        raise invalid("Last-Event-ID", "no event of that id has been sent")
    if last.number + 1 < first:
        raise gone(f"events are kept from {turn}-{first} on; some that were missed have gone")
    return last.number + 1

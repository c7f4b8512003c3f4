"""/v1/responses/ID: read, follow, cancel and delete responses, and list what they answer."""

import asyncio
from contextlib import ExitStack
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from cottention.engine.state.event_log import EventLog
from cottention.server.api.dependencies import Context, ContextDep, reading
from cottention.server.api.generate import read_empty
from cottention.server.api.openapi import EMPTY_BODY, EVENTS, error_responses
from cottention.server.api.query_params import must_be, only_query_params
from cottention.server.api.responses.begun import store_of
from cottention.server.api.responses.creation import in_progress
from cottention.server.generation.json_pieces import object_response
from cottention.server.generation.sse import EventStreamResponse
from cottention.server.http.body import shown
from cottention.server.http.errors import ApiError, invalid
from cottention.server.responses.running import RunningResponse
from cottention.server.responses.values import StoredResponse, response_owner, session_id_of
from cottention.server.responses.writer import event_text, replayed
from cottention.server.schemas.responses import JsonObject
from cottention.server.schemas.responses_api import (
    INCLUDE,
    LOGPROBS,
)
from cottention.server.schemas.responses_objects import (
    DeletedResponse,
    InputItemList,
    ResponseObject,
)
from cottention.server.schemas.sampling import BOOLEAN
from cottention.server.sessions.live_events import LiveEventFollower, StoredEvents
from cottention.server.sessions.store_threads import in_store_thread
from cottention.server.sessions.turn_queue import owner_of

router = APIRouter()

RUNS_ELSEWHERE = "it runs at another server of the same store: ask that one, or wait"
MAX_PAGE = 100
LIMIT = f"a whole number from 1 to {MAX_PAGE}"
SEQUENCE_NUMBER = "a whole number from 0"
ERRORS = error_responses(400, 401, 404, 500, 503)

Include = Annotated[list[str] | None, Query(alias="include[]")]
PlainInclude = Annotated[list[str] | None, Query(alias="include")]


def _check_include(*lists: list[str] | None) -> None:
    for each in [each for given in lists for each in given or ()]:
        if each != LOGPROBS:
            raise invalid("include", f"include must be {INCLUDE}; {shown(each)} is not supported")


@router.get(
    "/v1/responses/{response_id}",
    response_model=ResponseObject,
    responses=ERRORS | error_responses(409, 410, 429, 507) | {200: {"content": EVENTS}},
    dependencies=[
        only_query_params("stream", "starting_after", "include", "include[]", "include_obfuscation")
    ],
)
async def get_response(
    response_id: str,
    request: Request,
    context: ContextDep,
    stream: Annotated[bool, must_be("stream", BOOLEAN)] = False,
    starting_after: Annotated[
        int | None, Field(ge=0), must_be("starting_after", SEQUENCE_NUMBER)
    ] = None,
    include: PlainInclude = None,
    include_list: Include = None,
    include_obfuscation: Annotated[bool, must_be("include_obfuscation", BOOLEAN)] = False,
) -> Response:
    """A response as it is now; with `stream` its events, those after `starting_after`."""
    _check_include(include, include_list)
    if include_obfuscation:
        raise invalid("include_obfuscation", "include_obfuscation is not supported: leave it out")
    if starting_after is not None and not stream:
        message = "starting_after is only allowed if stream is true: leave it out"
        raise invalid("starting_after", message)
    owner = owner_of(request)
    number = 0 if starting_after is None else starting_after + 1
    with ExitStack() as stack:
        if context.responses.find(owner, response_id) is None:
            stack.enter_context(reading(request, context))
        found = await _find(request, context, owner, response_id)
        if isinstance(found, Response):
            return found
        if isinstance(found, RunningResponse):
            return _followed(found, number, context) if stream else _as_it_is(found)
        if not stream:
            return object_response(found.response, is_long=True)
        if found.is_running:
            raise in_progress("stream", RUNS_ELSEWHERE)
        events = await asyncio.to_thread(_replayed, found)
        _check_number(number, len(events))
        log = StoredEvents(EventLog("", 0, events), number, stack.pop_all().close)
    return EventStreamResponse(log, context.config.sse_keep_alive_seconds)


def _as_it_is(running: RunningResponse) -> Response:
    return object_response(running.writer.snapshot(), is_long=False)


def _followed(running: RunningResponse, number: int, context: Context) -> Response:
    live = running.live
    if live is None:
        message = "the events of this response are sent to the client that asked for it"
        raise ApiError(409, message, param="stream", code="response_in_progress")
    if not live.may_come(number - 1):
        _check_number(number, live.stop)
    follower = LiveEventFollower(live, number)
    return EventStreamResponse(follower, context.config.sse_keep_alive_seconds)


async def _find(
    request: Request, context: Context, owner: str, response_id: str
) -> RunningResponse | StoredResponse | Response:
    """A response that runs here, or is stored; else what the server says where it runs.

    Raises ApiError 404 and 503, SessionError.
    """
    session_id, load = session_id_of(response_id), store_of(context).load
    if (running := context.responses.find(owner, response_id)) is not None:
        return running
    stored = await in_store_thread(load, owner, response_id)
    if not stored.is_running or context.replicas is None:
        return stored
    told = await context.replicas.elsewhere(
        request,
        b"",
        response_owner(owner),
        session_id,
        lambda: context.responses.find(owner, response_id) is not None,
    )
    if told is not None:
        return told
    if (running := context.responses.find(owner, response_id)) is not None:
        return running  # it was adopted meanwhile
    stored = await in_store_thread(load, owner, response_id)
    return stored.interrupted() if stored.is_running else stored  # it has ended, or nobody has it


def _replayed(stored: StoredResponse) -> tuple[bytes, ...]:
    return tuple(event_text(each).encode() for each in replayed(stored.response, stored.cuts))


@router.post(
    "/v1/responses/{response_id}/cancel",
    response_model=ResponseObject,
    responses=ERRORS | error_responses(413, 415, 507),
    openapi_extra={"requestBody": EMPTY_BODY},
)
async def cancel_response(response_id: str, request: Request, context: ContextDep) -> Response:
    """End a response with what there is; one that has ended is as it was."""
    await read_empty(request, context)
    owner = owner_of(request)
    session_id_of(response_id)
    try:
        found = await _find(request, context, owner, response_id)
    except ApiError as error:
        if error.status != 404 or context.replicas is None:
            raise
        # one that does not run in the background is stored at its end
        told = await context.replicas.anywhere(request, b"")
        if told is None:
            raise
        return told
    if isinstance(found, Response):
        return found
    if isinstance(found, RunningResponse):
        await found.cancel()
        return object_response(found.writer.snapshot(), is_long=True)
    if found.is_running:
        raise in_progress("response_id", RUNS_ELSEWHERE)
    return object_response(found.response, is_long=True)


@router.get(
    "/v1/responses/{response_id}/input_items",
    response_model=InputItemList,
    responses=ERRORS | error_responses(507),
    dependencies=[only_query_params("limit", "order", "after", "include", "include[]")],
)
async def list_input_items(
    response_id: str,
    request: Request,
    context: ContextDep,
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE), must_be("limit", LIMIT)] = 20,
    order: Annotated[Literal["asc", "desc"], must_be("order", '"asc" or "desc"')] = "desc",
    after: str | None = None,
    include: PlainInclude = None,
    include_list: Include = None,
) -> Response:
    """The items of the request itself; those of earlier ones are theirs."""
    _check_include(include, include_list)
    owner = owner_of(request)
    running = context.responses.find(owner, response_id)
    if running is None:
        items = (await in_store_thread(store_of(context).load, owner, response_id)).input
    else:
        items = running.input
    items = items[::-1] if order == "desc" else items
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise invalid("after", f"after must be the id of an item; it is {shown(after)}")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    found = {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > len(page),
    }
    return object_response(found, is_long=True)


@router.delete(
    "/v1/responses/{response_id}",
    response_model=DeletedResponse,
    responses=ERRORS | error_responses(413, 415, 507),
)
async def delete_response(
    response_id: str, request: Request, context: ContextDep
) -> JsonObject | Response:
    """Forget a response; those that continued it stay. One that runs is cancelled first."""
    await read_empty(request, context)
    owner = owner_of(request)
    found = await _find(request, context, owner, response_id)
    if isinstance(found, Response):
        return found
    if isinstance(found, RunningResponse):
        await found.cancel()
        if not found.has_ended.is_set():
            raise ApiError(409, "the response still ends: try again", code="response_in_progress")
    await in_store_thread(store_of(context).delete, owner, response_id)
    return {"id": response_id, "object": "response", "deleted": True}


def _check_number(number: int, stop: int) -> None:
    if number > stop:
        message = f"starting_after must be at most {stop - 1} now; it is {number - 1}"
        raise invalid("starting_after", message)

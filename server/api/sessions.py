"""/v1/sessions: open, list, get, append to, fork, rewind and delete sessions."""

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Request, Response
from pydantic import Field

from cottention.engine.errors import SessionMovedError
from cottention.engine.state.context_window import ContextPolicy
from cottention.server.api.dependencies import Context, ContextDep
from cottention.server.api.generate import deadline_of, read_body_with, read_nothing
from cottention.server.api.openapi import NOTHING, described, refusals
from cottention.server.api.query_params import must_be, query_of
from cottention.server.generation.request import (
    GenerationRequest,
    TurnOptions,
    in_session,
    reading_order,
)
from cottention.server.generation.responses import whole_pieces
from cottention.server.generation.sse import closing
from cottention.server.http.request_id import request_id_of
from cottention.server.limits.rate_limit import track
from cottention.server.schemas.base import checked
from cottention.server.schemas.responses import JsonObject
from cottention.server.schemas.session_responses import (
    DeletedSession,
    SessionList,
    SessionObject,
    session_list_response,
    session_response,
)
from cottention.server.schemas.sessions import (
    AppendRequest,
    ForkRequest,
    SessionRequest,
    fork_request,
    session_request,
)
from cottention.server.sessions.turn_queue import Caller, caller_of

if TYPE_CHECKING:  # they bring torch with them, which the server does not know
    from cottention.engine.sessions.types import Session
    from cottention.engine.state.session_state import SessionState

router = APIRouter()

MAX_PAGE = 100
LIMIT = f"a whole number from 1 to {MAX_PAGE}"
REFUSALS = refusals(400, 401, 404, 500)
MOVES = refusals(409, 412, 507)


@router.post(
    "/v1/sessions",
    response_model=SessionObject,
    **described(SessionRequest, examples=[{"prompt": "def f(x):"}], more=MOVES),
)
async def open_session(request: Request, context: ContextDep) -> Response:
    """A new session, which holds the prompt if there is one."""
    context.bridge.check_accepting()
    owner = caller_of(request).owner
    body = await read_body_with(request, context, lambda body, _: session_request(body))
    state = _empty(body.context_policy, context)
    if body.prompt:
        order = await _order(body.prompt, context)
        state = await _read_in(request, context, order, state)
    open_, seconds = context.sessions.open, body.ttl_seconds
    return session_response(await asyncio.to_thread(open_, owner, state, body.metadata, seconds))


@router.get(
    "/v1/sessions",
    response_model=SessionList,
    responses=REFUSALS,
    dependencies=[query_of("limit", "after")],
)
async def list_sessions(
    request: Request,
    context: ContextDep,
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE), must_be("limit", LIMIT)] = 20,
    after: str | None = None,
) -> Response:
    """The caller's sessions, newest first."""
    owner = caller_of(request).owner
    return session_list_response(
        *await asyncio.to_thread(context.sessions.page, owner, after, limit)
    )


@router.get("/v1/sessions/{session_id}", response_model=SessionObject, responses=REFUSALS)
async def get_session(session_id: str, request: Request, context: ContextDep) -> Response:
    """One session."""
    owner = caller_of(request).owner
    return session_response(await asyncio.to_thread(context.sessions.find, owner, session_id))


@router.delete(
    "/v1/sessions/{session_id}",
    response_model=DeletedSession,
    responses=REFUSALS | refusals(409, 412, 413, 415),
)
async def delete_session(session_id: str, request: Request, context: ContextDep) -> JsonObject:
    """Delete a session, unless a turn runs."""
    caller = caller_of(request)
    await read_nothing(request, context)
    async with context.turns.exclusive(caller.owner, session_id, "error", request.receive):
        await _as_expected(caller, session_id, context)
        await asyncio.to_thread(context.sessions.delete, caller.owner, session_id)
    return {"id": session_id, "object": "session", "deleted": True}


@router.post(
    "/v1/sessions/{session_id}/append",
    response_model=SessionObject,
    **described(AppendRequest, examples=[{"prompt": "def f(x):"}], more=MOVES),
)
async def append_to_session(session_id: str, request: Request, context: ContextDep) -> Response:
    """A turn that prefills a prompt and generates nothing; no turn where the prompt is empty."""
    context.bridge.check_accepting()
    caller = caller_of(request)
    body = await read_body_with(request, context, lambda body, _: checked(AppendRequest, body))
    if not body.prompt:
        async with context.turns.exclusive(
            caller.owner, session_id, body.on_conflict, request.receive
        ):
            return session_response(await _as_expected(caller, session_id, context))
    order = await _order(body.prompt, context)
    terms = TurnOptions(session_id, body.on_conflict, "rollback")
    async with context.turns.turn(caller, terms, request.receive) as turn:
        state = await _read_in(request, context, order, turn.state)
        return session_response(await turn.commit(state))


@router.post(
    "/v1/sessions/{session_id}/fork",
    response_model=SessionList,
    **described(ForkRequest, examples=[{"n": 2}], more=MOVES),
)
async def fork_session(session_id: str, request: Request, context: ContextDep) -> Response:
    """New sessions that continue from this one's state, independently of each other."""
    context.bridge.check_accepting()
    caller = caller_of(request)
    body = await read_body_with(request, context, lambda body, _: fork_request(body))
    fork, position = context.sessions.fork, caller.expected_position
    async with context.turns.exclusive(caller.owner, session_id, body.on_conflict, request.receive):
        forks = await asyncio.to_thread(fork, caller.owner, session_id, body.n, position)
    return session_list_response(forks, has_more=False)


@router.post(
    "/v1/sessions/{session_id}/rewind",
    response_model=SessionObject,
    responses=REFUSALS | MOVES | refusals(413, 415),
    openapi_extra={"requestBody": NOTHING},
)
async def rewind_session(session_id: str, request: Request, context: ContextDep) -> Response:
    """Undo the last turn."""
    caller = caller_of(request)
    await read_nothing(request, context)
    async with context.turns.exclusive(caller.owner, session_id, "error", request.receive):
        rewind, position = context.sessions.rewind, caller.expected_position
        return session_response(await asyncio.to_thread(rewind, caller.owner, session_id, position))


async def _order(prompt: str | list[int], context: Context) -> GenerationRequest:
    """A request that prefills a prompt; special tokens are added unless it is empty."""
    if isinstance(prompt, list):
        return reading_order(prompt)
    if not prompt:
        return reading_order([])
    with context.bridge.line.reading(len(prompt)):
        ids = await asyncio.to_thread(context.bridge.engine.tokenizer.encode, prompt)
    return replace(reading_order(ids), frames_first=True)


async def _read_in(
    request: Request, context: Context, order: GenerationRequest, start: "SessionState"
) -> "SessionState":
    """The state after a prompt. Raises ParameterError, EngineStoppedError, ApiError."""
    now = asyncio.get_running_loop().time()
    order = replace(in_session(order, start, context.bridge.engine.tokenizer), start=start)
    order = replace(order, deadline=deadline_of(order, context.config, now))
    reading = await context.bridge.open(f"session-{request_id_of(request)}", order)
    track(request.scope, order, reading)
    async with closing(reading, request.receive):
        state = (await whole_pieces(reading))[0].state
    assert state is not None, "no text was generated that could have been cut"
    return state


async def _as_expected(caller: Caller, session_id: str, context: Context) -> "Session":
    """The session. Raises SessionMovedError where it is not at the caller's position."""
    found = await asyncio.to_thread(context.sessions.find, caller.owner, session_id)
    expected = caller.expected_position
    if expected not in (None, found.position):
        raise SessionMovedError(f"the session is at position {found.position}, not at {expected}")
    return found


def _empty(policy: ContextPolicy | None, context: Context) -> "SessionState":
    """The state of an empty session. Raises ParameterError for a policy that is not served."""
    return context.bridge.engine.policies.new_session(policy)

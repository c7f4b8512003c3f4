"""/v1/sessions: open, list, look at, continue without an answer, fork, rewind, delete.

Owns the order of the checks. What a session is belongs to the engine's `Sessions`, whose turn it is
to `turns.py`; bytes on the wire are `snapshots.py`'s.
"""

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
    told,
    told_all,
)
from cottention.server.schemas.sessions import (
    AppendRequest,
    ForkRequest,
    SessionRequest,
    fork_request,
    session_request,
)
from cottention.server.sessions.turn_queue import Caller, asked_by

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
    """A new session, which has read the prompt if there is one."""
    context.bridge.check_accepting()
    owner = asked_by(request).owner
    asked = await read_body_with(request, context, lambda body, _: session_request(body))
    state = _nothing(asked.context_policy, context)
    if asked.prompt:
        order = await _order(asked.prompt, context)
        state = await _read_in(request, context, order, state)
    put_in, seconds = context.sessions.open, asked.ttl_seconds
    return told(await asyncio.to_thread(put_in, owner, state, asked.metadata, seconds))


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
    """One's own sessions, the newest first."""
    owner = asked_by(request).owner
    return told_all(*await asyncio.to_thread(context.sessions.page, owner, after, limit))


@router.get("/v1/sessions/{session_id}", response_model=SessionObject, responses=REFUSALS)
async def get_session(session_id: str, request: Request, context: ContextDep) -> Response:
    """One session."""
    owner = asked_by(request).owner
    return told(await asyncio.to_thread(context.sessions.find, owner, session_id))


@router.delete(
    "/v1/sessions/{session_id}",
    response_model=DeletedSession,
    responses=REFUSALS | refusals(409, 412, 413, 415),
)
async def delete_session(session_id: str, request: Request, context: ContextDep) -> JsonObject:
    """Forget a session, unless a turn runs."""
    asker = asked_by(request)
    await read_nothing(request, context)
    async with context.turns.alone(asker.owner, session_id, "error", request.receive):
        await _as_expected(asker, session_id, context)
        await asyncio.to_thread(context.sessions.delete, asker.owner, session_id)
    return {"id": session_id, "object": "session", "deleted": True}


@router.post(
    "/v1/sessions/{session_id}/append",
    response_model=SessionObject,
    **described(AppendRequest, examples=[{"prompt": "def f(x):"}], more=MOVES),
)
async def append_to_session(session_id: str, request: Request, context: ContextDep) -> Response:
    """A turn that reads and says nothing; no turn where there is nothing to read."""
    context.bridge.check_accepting()
    asker = asked_by(request)
    body = await read_body_with(request, context, lambda body, _: checked(AppendRequest, body))
    if not body.prompt:
        async with context.turns.alone(asker.owner, session_id, body.on_conflict, request.receive):
            return told(await _as_expected(asker, session_id, context))
    order = await _order(body.prompt, context)
    terms = TurnOptions(session_id, body.on_conflict, "rollback")
    async with context.turns.turn(asker, terms, request.receive) as turn:
        state = await _read_in(request, context, order, turn.state)
        return told(await turn.commit(state))


@router.post(
    "/v1/sessions/{session_id}/fork",
    response_model=SessionList,
    **described(ForkRequest, examples=[{"n": 2}], more=MOVES),
)
async def fork_session(session_id: str, request: Request, context: ContextDep) -> Response:
    """Sessions that go on from here by themselves; they share nothing that changes."""
    context.bridge.check_accepting()
    asker = asked_by(request)
    body = await read_body_with(request, context, lambda body, _: fork_request(body))
    fork, position = context.sessions.fork, asker.expected_position
    async with context.turns.alone(asker.owner, session_id, body.on_conflict, request.receive):
        forks = await asyncio.to_thread(fork, asker.owner, session_id, body.n, position)
    return told_all(forks, has_more=False)


@router.post(
    "/v1/sessions/{session_id}/rewind",
    response_model=SessionObject,
    responses=REFUSALS | MOVES | refusals(413, 415),
    openapi_extra={"requestBody": NOTHING},
)
async def rewind_session(session_id: str, request: Request, context: ContextDep) -> Response:
    """Back to where the last turn began."""
    asker = asked_by(request)
    await read_nothing(request, context)
    async with context.turns.alone(asker.owner, session_id, "error", request.receive):
        rewind, position = context.sessions.rewind, asker.expected_position
        return told(await asyncio.to_thread(rewind, asker.owner, session_id, position))


async def _order(prompt: str | list[int], context: Context) -> GenerationRequest:
    """A prompt that is read and not answered; nothing is added to one that says nothing."""
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
    """The session after a prompt. Raises ParameterError, EngineStoppedError, ApiError."""
    now = asyncio.get_running_loop().time()
    order = replace(in_session(order, start, context.bridge.engine.tokenizer), start=start)
    order = replace(order, deadline=deadline_of(order, context.config, now))
    reading = await context.bridge.open(f"session-{request_id_of(request)}", order)
    track(request.scope, order, reading)
    async with closing(reading, request.receive):
        state = (await whole_pieces(reading))[0].state
    assert state is not None, "nothing was to be said, and so nothing can have been cut"
    return state


async def _as_expected(asker: Caller, session_id: str, context: Context) -> "Session":
    """The session. Raises SessionMovedError where it is not at the position that was asked for."""
    found = await asyncio.to_thread(context.sessions.find, asker.owner, session_id)
    expected = asker.expected_position
    if expected not in (None, found.position):
        raise SessionMovedError(f"the session is at position {found.position}, not at {expected}")
    return found


def _nothing(policy: ContextPolicy | None, context: Context) -> "SessionState":
    """A session that holds no token, under a policy that the engine has. Raises ParameterError."""
    return context.bridge.engine.policies.new_session(policy)

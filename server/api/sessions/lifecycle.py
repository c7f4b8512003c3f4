"""/v1/sessions: create, list, get, append to, fork, rewind, cancel and delete sessions."""

import asyncio
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Request, Response
from pydantic import Field

from cottention.engine.errors import SessionMovedError
from cottention.server.api.dependencies import Context, ContextDep, elsewhere, reading
from cottention.server.api.generate import once, read_empty, read_parsed
from cottention.server.api.openapi import EMPTY_BODY, error_responses, request_docs
from cottention.server.api.query_params import must_be, only_query_params
from cottention.server.generation.cancellation import Cancellation, request_cancelled
from cottention.server.generation.deadline import (
    deadline_of,
    entered_before,
    wait_for_client,
)
from cottention.server.generation.request import TurnOptions, prefill_request, turn_prompt
from cottention.server.generation.responses import collect_outputs
from cottention.server.generation.sse import close_on_disconnect
from cottention.server.http.request_id import request_id_of
from cottention.server.idempotency.keys import ResponseOnce, keyed_request_of
from cottention.server.limits.rate_limit import client_of, track
from cottention.server.schemas.base import validate
from cottention.server.schemas.responses import JsonObject
from cottention.server.schemas.sampling import BOOLEAN, OnConflict
from cottention.server.schemas.session_responses import (
    CancelledTurn,
    DeletedSession,
    SessionList,
    SessionObject,
    SessionTokens,
    session_list_response,
    session_response,
    session_tokens_response,
)
from cottention.server.schemas.sessions import (
    AppendRequest,
    ForkRequest,
    SessionRequest,
    fork_request,
    session_request,
)
from cottention.server.sessions.store_threads import in_store_thread
from cottention.server.sessions.turn_queue import Caller, caller_of, owner_of

if TYPE_CHECKING:  # these import torch, which the server must not load
    from cottention.engine.sessions.types import Session
    from cottention.engine.state.session_state import SessionState

router = APIRouter()

MAX_PAGE = 100
LIMIT = f"a whole number from 1 to {MAX_PAGE}"
ERRORS = error_responses(400, 401, 404, 500)
TURN_ERRORS = error_responses(403, 409, 412, 507)


@router.post(
    "/v1/sessions",
    response_model=SessionObject,
    **request_docs(SessionRequest, examples=[{"prompt": "def f(x):"}], more=TURN_ERRORS),
)
async def open_session(request: Request, context: ContextDep) -> Response:
    """A new session, which holds the prompt if there is one."""
    context.engine.check_accepting()
    owner = caller_of(request).owner
    body = await read_parsed(request, context, lambda fields, _: session_request(fields))
    deadline = _deadline_from_now(context)
    state = context.policies.new_session(body.context_policy)
    if body.prompt:
        is_text = isinstance(body.prompt, str)
        ids = await _encode(body.prompt, request, context, deadline)
        state = await _prefill(
            request, context, ids, state, deadline, add_special_tokens_if_empty=is_text
        )
    create = context.sessions.open
    return session_response(
        await in_store_thread(create, owner, state, body.metadata, body.ttl_seconds)
    )


@router.get(
    "/v1/sessions",
    response_model=SessionList,
    responses=ERRORS,
    dependencies=[only_query_params("limit", "after")],
)
async def list_sessions(
    request: Request,
    context: ContextDep,
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE), must_be("limit", LIMIT)] = 20,
    after: str | None = None,
) -> Response:
    """The caller's sessions, newest first."""
    owner = caller_of(request).owner
    return session_list_response(*await in_store_thread(context.sessions.page, owner, after, limit))


@router.get("/v1/sessions/{session_id}", response_model=SessionObject, responses=ERRORS)
async def get_session(session_id: str, request: Request, context: ContextDep) -> Response:
    """One session."""
    owner = caller_of(request).owner
    return session_response(await in_store_thread(context.sessions.find, owner, session_id))


@router.get("/v1/sessions/{session_id}/tokens", response_model=SessionTokens, responses=ERRORS)
async def get_session_tokens(session_id: str, request: Request, context: ContextDep) -> Response:
    """The token ids that a session keeps of its end: as many as one context window holds."""
    owner, read = caller_of(request).owner, context.sessions.recent_ids
    with reading(request, context):
        return session_tokens_response(*await in_store_thread(read, owner, session_id))


@router.delete(
    "/v1/sessions/{session_id}",
    response_model=DeletedSession,
    responses=ERRORS | error_responses(409, 412, 413, 415, 503),
    dependencies=[only_query_params("cancel")],
)
async def delete_session(
    session_id: str,
    request: Request,
    context: ContextDep,
    cancel: Annotated[bool, must_be("cancel", BOOLEAN)] = False,
) -> JsonObject | Response:
    """Delete a session, unless a turn is running; with `cancel` that is cancelled first."""
    caller, turns = caller_of(request), context.turns
    await read_empty(request, context)
    if cancel:  # If-Match is the position before the turn, which changes it
        await _find_at_position(caller, session_id, context)
        caller = Caller(caller.owner, None)
        is_active = turns.is_active(caller.owner, session_id)
        if not is_active and (
            found := await elsewhere(
                request, context, session_id, lambda: turns.is_active(caller.owner, session_id)
            )
        ):
            return found
        turns.request_cancel(caller.owner, session_id)
    on_conflict: OnConflict = "wait" if cancel else "error"
    async with turns.exclusive(
        caller.owner, session_id, on_conflict, request.receive, is_next=cancel
    ):
        await _find_at_position(caller, session_id, context)
        await in_store_thread(context.sessions.delete, caller.owner, session_id)
    return {"id": session_id, "object": "session", "deleted": True}


@router.post(
    "/v1/sessions/{session_id}/cancel",
    response_model=CancelledTurn,
    responses=ERRORS | error_responses(413, 415, 503),
    openapi_extra={"requestBody": EMPTY_BODY},
)
async def cancel_turn(
    session_id: str, request: Request, context: ContextDep
) -> JsonObject | Response:
    """End the session's running turn, also one that goes on without its client."""
    owner, turns = caller_of(request).owner, context.turns
    await read_empty(request, context)
    await in_store_thread(context.sessions.find, owner, session_id)
    status = await turns.cancel(owner, session_id)
    if status is None:
        found = await elsewhere(
            request, context, session_id, lambda: turns.is_active(owner, session_id)
        )
        if found is not None:
            return found
        status = await turns.cancel(owner, session_id)
    return {"id": session_id, "status": status or "idle"}


@router.post(
    "/v1/sessions/{session_id}/append",
    response_model=SessionObject,
    **request_docs(
        AppendRequest, examples=[{"prompt": "def f(x):"}], more=TURN_ERRORS, is_idempotent=True
    ),
)
async def append_to_session(session_id: str, request: Request, context: ContextDep) -> Response:
    """Add a prompt to a session without generating; an empty prompt changes nothing."""
    return await once(request, context, lambda each: _append(session_id, each, context))


async def _append(session_id: str, request: Request, context: Context) -> Response:
    context.engine.check_accepting()
    caller = caller_of(request)
    body = await read_parsed(request, context, lambda fields, _: validate(AppendRequest, fields))
    deadline = _deadline_from_now(context)
    if not body.prompt:
        place = context.turns.exclusive(caller.owner, session_id, body.on_conflict, request.receive)
        async with entered_before(deadline, place):
            return session_response(await _find_at_position(caller, session_id, context))
    is_text = isinstance(body.prompt, str)
    ids = await _encode(body.prompt, request, context, deadline)
    options = TurnOptions(session_id, body.on_conflict, "rollback")
    cancellation = Cancellation(context.engine.cancel)
    turns = context.turns.turn(caller, options, request.receive, cancellation)
    async with cancellation.entered(entered_before(deadline, turns)) as turn:
        state = await _prefill(
            request,
            context,
            ids,
            turn.state,
            deadline,
            add_special_tokens_if_empty=is_text,
            cancellation=cancellation,
        )
        told = ResponseOnce(keyed_request_of(request.scope), _one)
        return told.respond([await turn.commit(state, answer=told.answer)])


@router.post(
    "/v1/sessions/{session_id}/fork",
    response_model=SessionList,
    **request_docs(ForkRequest, examples=[{"n": 2}], more=TURN_ERRORS, is_idempotent=True),
)
async def fork_session(session_id: str, request: Request, context: ContextDep) -> Response:
    """Copies of a session that are independent of it and of each other."""
    return await once(request, context, lambda each: _fork(session_id, each, context))


async def _fork(session_id: str, request: Request, context: Context) -> Response:
    context.engine.check_accepting()
    caller = caller_of(request)
    body = await read_parsed(request, context, lambda fields, _: fork_request(fields))
    told = ResponseOnce(keyed_request_of(request.scope), _forks)
    more = {} if told.answer is None else {"answer": told.answer}
    deadline, turns = _deadline_from_now(context), context.turns

    async def fork() -> "list[Session]":
        return await in_store_thread(
            context.sessions.fork,
            caller.owner,
            session_id,
            body.n,
            caller.expected_position,
            body.metadata,
            **more,
        )

    place = turns.exclusive(caller.owner, session_id, body.on_conflict, request.receive)
    async with entered_before(deadline, place):
        forks = await turns.when_free(fork, body.on_conflict, request.receive, deadline)
    return told.respond(forks)


@router.post(
    "/v1/sessions/{session_id}/rewind",
    response_model=SessionObject,
    responses=ERRORS | TURN_ERRORS | error_responses(413, 415),
    openapi_extra={"requestBody": EMPTY_BODY},
)
async def rewind_session(session_id: str, request: Request, context: ContextDep) -> Response:
    """Restore a session to its state before the last turn."""
    caller = caller_of(request)
    await read_empty(request, context)
    async with context.turns.exclusive(caller.owner, session_id, "error", request.receive):
        rewind, position = context.sessions.rewind, caller.expected_position
        rewound = await context.turns.when_free(
            lambda: in_store_thread(rewind, caller.owner, session_id, position),
            "error",
            request.receive,
        )
        return session_response(rewound)


def _one(sessions: "list[Session]") -> Response:
    return session_response(sessions[0])


def _forks(sessions: "list[Session]") -> Response:
    return session_list_response(sessions, has_more=False)


def _deadline_from_now(context: Context) -> float | None:
    """The deadline of a request whose body has arrived; it has no timeout of its own."""
    return deadline_of(asyncio.get_running_loop().time(), context.config)


async def _encode(
    prompt: str | list[int], request: Request, context: Context, deadline: float | None
) -> list[int]:
    """Token ids of a prompt. Raises ApiError 504; OutputStreamClosed where the client leaves."""
    if isinstance(prompt, list):
        return prompt

    async def encode() -> list[int]:
        with context.engine.admission_queue.tokenizing(len(prompt), owner_of(request)):
            async with context.bodies.turn(request, len(prompt)):
                return await asyncio.to_thread(context.tokenizer.encode, prompt)

    return await wait_for_client(deadline, request.receive, encode())


async def _prefill(
    request: Request,
    context: Context,
    prompt_ids: list[int],
    start: "SessionState",
    deadline: float | None,
    *,
    add_special_tokens_if_empty: bool,
    cancellation: Cancellation | None = None,
) -> "SessionState":
    """The session `start` with a prompt added; `add_special_tokens_if_empty` is ParsedRequest's.

    cancellation: that of the turn, which may be cancelled by its session.
    Raises ParameterError, EngineStoppedError, ApiError.
    """
    prompt_ids = turn_prompt(
        prompt_ids,
        start,
        context.tokenizer,
        add_special_tokens_if_empty=add_special_tokens_if_empty,
    )
    num_reread = context.policies.num_reread(start, len(prompt_ids))
    generation_request = prefill_request(prompt_ids, num_reread)
    name = f"session-{request_id_of(request)}"
    client = client_of(request.scope)
    stream = await context.engine.generate(
        name, generation_request, start=start, deadline=deadline, client=client
    )
    if cancellation is not None:
        cancellation.attach(stream)
    track(request.scope, generation_request, stream)
    async with close_on_disconnect(stream, request.receive):
        state = (await collect_outputs(stream))[0].state
    if state is None:  # a prefill generates no text that could be cut
        raise request_cancelled()
    return state


async def _find_at_position(caller: Caller, session_id: str, context: Context) -> "Session":
    """The session. Raises SessionMovedError unless it is at the caller's expected position."""
    found = await in_store_thread(context.sessions.find, caller.owner, session_id)
    expected = caller.expected_position
    if expected not in (None, found.position):
        raise SessionMovedError(f"the session is at position {found.position}, not at {expected}")
    return found

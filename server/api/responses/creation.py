"""POST /v1/responses: answers an input, whole, streamed or in the background, as OpenAI's does."""

import time
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from cottention.engine.errors import ParameterError
from cottention.server.api.chat import ALWAYS_IN_THREAD, parse_chat
from cottention.server.api.dependencies import Context, ContextDep
from cottention.server.api.generate import once, open_request, read_request, settled
from cottention.server.api.journaled import can_go_on, new_journaled
from cottention.server.api.openapi import error_responses, request_docs
from cottention.server.api.responses.background import begin_alone
from cottention.server.api.responses.begun import (
    Asked,
    BegunResponse,
    ParsedResponse,
    begin_response,
    is_durable,
    store_of,
)
from cottention.server.generation.cancellation import Cancellation
from cottention.server.generation.deadline import deadline_of
from cottention.server.generation.json_pieces import object_response
from cottention.server.generation.request import MAX_INLINE_TOKENS
from cottention.server.generation.responses import collect_outputs
from cottention.server.generation.sse import EventStreamResponse, close_on_disconnect
from cottention.server.http.body import shown
from cottention.server.http.errors import ApiError, invalid
from cottention.server.idempotency.keys import KeyedRequest, keyed_request_of
from cottention.server.idempotency.recording import answer_of
from cottention.server.limits.rate_limit import client_of, track
from cottention.server.observability.access_log import request_record
from cottention.server.responses.values import ResponseStore, StoredResponse, new_response_id
from cottention.server.schemas.base import validate
from cottention.server.schemas.responses_api import CHAT_NAMES, ResponseRequest
from cottention.server.schemas.responses_objects import ResponseObject
from cottention.server.sessions.store_threads import in_store_thread
from cottention.server.sessions.turn_queue import owner_of

if TYPE_CHECKING:  # they import torch, which the server must not load
    from cottention.engine.sessions.types import SessionAnswer
    from cottention.engine.state.session_state import SessionState

router = APIRouter()

EXAMPLES = (
    {"input": "Write a loop.", "max_output_tokens": 8},
    {
        "input": [{"role": "user", "content": "Write a loop."}],
        "instructions": "Be brief.",
        "max_output_tokens": 8,
        "stream": True,
    },
)


@router.post(
    "/v1/responses",
    response_model=ResponseObject,
    **request_docs(
        ResponseRequest,
        examples=EXAMPLES,
        streams=True,
        more=error_responses(403, 409, 507),
        is_idempotent=True,
    ),
)
async def create_response(request: Request, context: ContextDep) -> Response:
    """Answer an input, which may continue an earlier response from its state."""
    return await once(request, context, lambda each: _create(each, context))


async def _create(request: Request, context: Context) -> Response:
    parsed, arrived_at = await read_request(request, context, parse_response, ALWAYS_IN_THREAD)
    body, chat = parsed.body, parsed.chat
    try:
        context.limits.check(chat)
        chat.check_items(context.config.max_response_items)
    except ApiError as error:
        raise _renamed(error) from None
    context.bodies.response(request).at_least(chat.num_items)
    deadline = deadline_of(arrived_at, context.config, body.timeout)
    name, cancellation = open_request(request, context, "resp", body.request_id)
    try:
        return await _respond(request, context, parsed, name, deadline, cancellation)
    except BaseException:
        cancellation.end()
        raise


def parse_response(fields: dict[str, Any], context: Context) -> ParsedResponse:
    """Validate a body, render its items as a chat and tokenize it. Raises ApiError."""
    body = validate(ResponseRequest, fields)
    is_kept = is_durable(context) if body.store is None else body.store
    if body.background and not is_kept:
        message = "background is only allowed with store, by which its answer can be read later"
        raise invalid("background", f"{message}: send store true")
    given = body.as_chat()
    if is_kept or body.previous_response_id is not None:
        given["session_id"] = "response"  # the prompt is that of a turn, which goes on from a state
    try:
        chat = parse_chat({name: each for name, each in given.items() if each is not None}, context)
    except ApiError as error:
        raise _renamed(error) from None
    return ParsedResponse(body, chat, is_kept)


def _renamed(error: ApiError) -> ApiError:
    """An error of a chat's fields, with the names that they have here."""
    message, param = str(error), error.param
    for chat_name, name in CHAT_NAMES.items():
        if param is not None and (param == chat_name or param.startswith(f"{chat_name}.")):
            param = name + param.removeprefix(chat_name)
            message = message.replace(chat_name, name)
    message = message.replace(".function.", ".")  # tools are flat here
    return ApiError(error.status, message, param=param, code=error.code, headers=error.headers)


async def _respond(
    request: Request,
    context: Context,
    parsed: ParsedResponse,
    name: str,
    deadline: float | None,
    cancellation: Cancellation,
) -> Response:
    body, scope = parsed.body, request.scope
    owner, keyed = owner_of(request), keyed_request_of(scope)
    start = await _start(parsed, context, store_of(context), owner)
    entry = None
    if body.background and can_go_on(context, parsed.chat.params):
        seed = parsed.chat.params.seed
        entry = new_journaled(scope, context, owner, name, deadline, seed, keyed)
    asked = Asked(
        owner=owner,
        name=name,
        parsed=parsed,
        response_id=new_response_id(),
        created=int(time.time()) if entry is None else entry.created,
        deadline=deadline,
        client=client_of(scope),
        cancellation=cancellation,
        entry=entry,
    )
    try:
        begun = await begin_response(context, asked, start)
    except ParameterError as error:
        raise _renamed(invalid(error.param, str(error))) from None
    track(scope, begun.request, begun.stream)
    if body.background:
        assert start is not None
        response, task = await begin_alone(context, asked, begun, start, keyed)
        request_record(scope).background_turn = task
        return response
    if body.stream:
        return _streamed(begun, keyed, context)
    return await _whole(begun, keyed, request)


async def _whole(begun: BegunResponse, keyed: KeyedRequest | None, request: Request) -> Response:
    run, stream, writer = begun.run, begun.stream, begun.writer
    if keyed is not None:

        def answer(_: str) -> "SessionAnswer":
            kept = answer_of(object_response(writer.response, is_long=False))
            return keyed.session_answer(lambda _: kept)

        run.answer_with(answer)
    async with begun.stack, close_on_disconnect(stream, request.receive):
        deltas = await collect_outputs(stream)
        writer.begin()
        run.add(deltas[0])
        await run.end(deltas[0])
        if run.error is not None:
            raise run.error
        if keyed is not None:
            keyed.is_kept = run.is_answered
        is_long = keyed is None and stream.num_generated > MAX_INLINE_TOKENS
        return object_response(writer.response, is_long=is_long)


def _streamed(begun: BegunResponse, keyed: KeyedRequest | None, context: Context) -> Response:
    if keyed is not None:
        recording = keyed.recording

        def answer(last_events: str) -> "SessionAnswer":
            kept = recording.answer_ending_with(last_events.encode())
            return keyed.session_answer(lambda _: kept)

        begun.run.answer_with(answer)
    return _Streamed(begun, keyed, context.config.sse_keep_alive_seconds)


class _Streamed(EventStreamResponse):
    """Sends a response's events; what belongs to it is left at the end."""

    def __init__(
        self, begun: BegunResponse, keyed: KeyedRequest | None, keep_alive_seconds: float
    ) -> None:
        super().__init__(begun.run, keep_alive_seconds)
        self._begun = begun
        self._keyed = keyed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with self._begun.stack:
            await super().__call__(scope, receive, send)
        if self._keyed is not None:
            self._keyed.is_kept = self._begun.run.is_answered


async def _start(
    parsed: ParsedResponse, context: Context, store: ResponseStore, owner: str
) -> "SessionState | None":
    """The state that the answer goes on from; None: none, and none is kept. Raises ApiError."""
    previous_id = parsed.body.previous_response_id
    if previous_id is None and not parsed.is_kept:
        return None
    state = context.policies.new_session(None)
    if previous_id is not None:
        param = "previous_response_id"
        running = context.responses.find(owner, previous_id)
        if running is not None:
            raise in_progress(param, "wait until it has")
        previous, state = await in_store_thread(store.load_state, owner, previous_id, param)
        if previous.is_running:  # at another server
            raise in_progress(param, "wait until it has")
        if not previous.can_continue:
            status = previous.response["status"]
            message = f"that response is {status} and has no state: continue one before it"
            raise invalid(param, message)
        _check_outputs(parsed.body, previous)
    return settled(state, parsed.chat, context)


def in_progress(param: str, what_to_do: str) -> ApiError:
    """A 409 for what is not possible before the end of a response; `param` is what was asked."""
    message = f"that response has not ended: {what_to_do}"
    return ApiError(409, message, param=param, code="response_in_progress")


def _check_outputs(body: ResponseRequest, previous: StoredResponse) -> None:
    """Raise ApiError unless outputs are of calls that there are."""
    items = [*previous.response["output"], *body.input]
    called = {item["call_id"] for item in items if item["type"] == "function_call"}
    for place, item in enumerate(body.input):
        if item["type"] == "function_call_output" and item["call_id"] not in called:
            message = f"there is no call {shown(item['call_id'])} that this is the output of"
            raise invalid("input", f"input[{place}].call_id: {message}")

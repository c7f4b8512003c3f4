"""POST /v1/responses: answers an input, whole, streamed or in the background, as OpenAI's does."""

import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from cottention.engine.errors import ParameterError
from cottention.server.api.chat import ALWAYS_IN_THREAD, parse_chat
from cottention.server.api.dependencies import Context, ContextDep
from cottention.server.api.generate import once, open_request, read_request, settled
from cottention.server.api.openapi import error_responses, request_docs
from cottention.server.generation.cancellation import Cancellation
from cottention.server.generation.deadline import deadline_of
from cottention.server.generation.json_pieces import object_response
from cottention.server.generation.request import MAX_INLINE_TOKENS, ParsedRequest
from cottention.server.generation.responses import check_outcome, collect_outputs
from cottention.server.generation.sse import EventStreamResponse, close_on_disconnect
from cottention.server.http.body import shown
from cottention.server.http.errors import ApiError, invalid
from cottention.server.idempotency.keys import KeyedRequest, keyed_request_of
from cottention.server.limits.rate_limit import client_of, track
from cottention.server.observability.access_log import request_record
from cottention.server.responses.run import ResponseRun
from cottention.server.responses.running import RunningResponse
from cottention.server.responses.values import (
    ResponseStore,
    StoredResponse,
    new_response_id,
    response_owner,
)
from cottention.server.responses.writer import ResponseWriter
from cottention.server.schemas.base import validate
from cottention.server.schemas.responses import JsonObject
from cottention.server.schemas.responses_api import (
    CHAT_NAMES,
    ResponseRequest,
)
from cottention.server.schemas.responses_objects import (
    ResponseObject,
)
from cottention.server.sessions.live_events import LiveEventFollower, LiveEvents
from cottention.server.sessions.store_threads import in_store_thread
from cottention.server.sessions.turn_queue import owner_of

if TYPE_CHECKING:  # it imports torch, which the server must not load
    from cottention.engine.state.session_state import SessionState

router = APIRouter()

NOTE = (
    "this response is kept until the server ends, or until it expires: start the server with"
    " --session-dir to keep responses longer"
)
EXAMPLES = (
    {"input": "Write a loop.", "max_output_tokens": 8},
    {
        "input": [{"role": "user", "content": "Write a loop."}],
        "instructions": "Be brief.",
        "max_output_tokens": 8,
        "stream": True,
    },
)


@dataclass(frozen=True, slots=True)
class ParsedResponse:
    """A body, and the chat that it asks for. is_kept: whether the response is stored."""

    body: ResponseRequest
    chat: ParsedRequest
    is_kept: bool

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt, as if it followed nothing."""
        return self.chat.num_prompt_tokens


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
    is_kept = _is_durable(context) if body.store is None else body.store
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
    body, owner = parsed.body, owner_of(request)
    store = store_of(context)
    start = await _start(parsed, context, store, owner)
    chat = parsed.chat
    generation = (
        chat.build()
        if start is None
        else chat.build_turn(start, context.tokenizer, context.policies)
    )
    client = client_of(request.scope)
    cache = chat.cache_use(owner) if start is None else None
    try:
        stream = await context.engine.generate(
            name, generation, start=start, deadline=deadline, client=client, cache=cache
        )
    except ParameterError as error:
        raise _renamed(invalid(error.param, str(error))) from None
    cancellation.attach(stream)
    track(request.scope, generation, stream)
    writer = ResponseWriter(_base(parsed, context))
    run = ResponseRun(stream, generation, writer, context.tokenizer)
    items = _with_ids(body.input, writer.response["id"])
    if parsed.is_kept:
        run.keep(store, owner, items, context.policies.new_session(None))
    live = LiveEvents(context.config.session_event_log_bytes) if body.background else None
    running = RunningResponse(writer, items, cancellation, live)
    stack = AsyncExitStack()
    stack.callback(stream.close)
    stack.enter_context(context.responses.entered(owner, running))
    if live is not None:
        try:
            await run.keep_begun()
        except BaseException:
            await stack.aclose()
            raise
        first = writer.snapshot()
        key = response_owner(owner), writer.response["id"]
        keyed = keyed_request_of(request.scope)
        task = context.turns.detach(key, live, _run_alone(run, live, stack, keyed))
        request_record(request.scope).background_turn = task
        if keyed is not None:
            keyed.turn, keyed.is_early = task, not body.stream
        if body.stream:
            return EventStreamResponse(
                LiveEventFollower(live, 0), context.config.sse_keep_alive_seconds
            )
        return object_response(first, is_long=False)
    if body.stream:
        return _Streamed(run, context.config.sse_keep_alive_seconds, stack)
    async with stack, close_on_disconnect(stream, request.receive):
        deltas = await collect_outputs(stream)
        writer.begin()
        run.add(deltas[0])
        await run.end(deltas[0])
        check_outcome(stream, deltas)
        if run.error is not None:
            raise run.error
        is_long = stream.num_generated > MAX_INLINE_TOKENS
        return object_response(writer.response, is_long=is_long)


class _Streamed(EventStreamResponse):
    """Sends a response's events; what belongs to it is left at the end."""

    def __init__(self, run: ResponseRun, keep_alive_seconds: float, stack: AsyncExitStack) -> None:
        super().__init__(run, keep_alive_seconds)
        self._stack = stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)


async def _run_alone(
    run: ResponseRun, live: LiveEvents, stack: AsyncExitStack, keyed: KeyedRequest | None
) -> None:
    """Run a response to its end without its client. keyed: is told whether it has failed."""
    has_failed = True
    try:
        async with stack:
            async for text in run.texts():
                live.add(text)
        has_failed = run.error is not None
    finally:
        live.end()
        if keyed is not None:
            keyed.has_failed = has_failed


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


def _base(parsed: ParsedResponse, context: Context) -> JsonObject:
    """A response's object, but for what comes with its output."""
    body, params = parsed.body, parsed.chat.params
    tools = [{"type": "function", **tool["function"]} for tool in body.tools]
    choice = body.tool_choice or "auto"
    if isinstance(choice, dict):
        choice = {"type": "function", "name": choice["function"]["name"]}
    response_id = new_response_id()
    note = {"note": NOTE} if parsed.is_kept and not _is_durable(context) else {}
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "model": context.model_name,
        "background": body.background,
        "store": parsed.is_kept,
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata,
        "parallel_tool_calls": body.parallel_tool_calls,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "text": {"format": _format_of(body)},
        "tool_choice": choice,
        "tools": tools,
        "truncation": body.truncation,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "user": None,
        **note,
    }


def _format_of(body: ResponseRequest) -> JsonObject:
    given = None if body.text is None else body.text.format
    if given is None:
        return {"type": "text"}
    return {"type": given["type"], **given.get("json_schema", {})}


def _with_ids(items: Sequence[JsonObject], response_id: str) -> list[JsonObject]:
    digits = response_id.removeprefix("resp_")
    prefixes = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}
    return [
        {"id": f"{prefixes[item['type']]}_{digits}i{place}", **item}
        for place, item in enumerate(items)
    ]


def _is_durable(context: Context) -> bool:
    """Whether stored responses outlive the server."""
    return context.config.session_dir is not None or context.config.session_store is not None


def store_of(context: Context) -> ResponseStore:
    """The stored responses."""
    return ResponseStore(context.sessions, context.config.response_ttl_seconds)

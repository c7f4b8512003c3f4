"""From an HTTP request to its response, whole or streamed, for every endpoint that generates."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fastapi import Request, Response

from cottention.engine.errors import ContextPolicyError
from cottention.server.api.dependencies import Context
from cottention.server.api.turn_response import TurnResponse
from cottention.server.generation.cancellation import Cancellation
from cottention.server.generation.deadline import (
    before_deadline,
    deadline_of,
    timeout_of,
    wait_for_client,
)
from cottention.server.generation.request import ParsedRequest
from cottention.server.generation.responses import (
    EndpointFormat,
    collect_outputs,
    format_response,
)
from cottention.server.generation.sse import (
    EventFormatter,
    EventStreamResponse,
    GenerationEvents,
    close_on_disconnect,
    until_done,
    usage_of,
)
from cottention.server.generation.timings import timings_of
from cottention.server.http.body import announced_bytes, read_body, shown
from cottention.server.http.errors import ApiError
from cottention.server.http.json_body import parse_object
from cottention.server.http.request_id import request_id_of
from cottention.server.idempotency.keys import key_of
from cottention.server.idempotency.recording import Answering
from cottention.server.limits.rate_limit import client_of, count_choices, track
from cottention.server.observability.access_log import request_record
from cottention.server.schemas.base import RequestModel, validate
from cottention.server.schemas.responses import JsonObject
from cottention.server.schemas.sampling import SamplingBody
from cottention.server.sessions.state_in_hand import (
    StateEvents,
    StateWriter,
    encoded_length,
    read_state,
)
from cottention.server.sessions.turn_queue import caller_of, owner_of

if TYPE_CHECKING:  # it imports torch, which the server must not load
    from cottention.engine.state.session_state import SessionState

MAX_INLINE_BYTES = 16 * 1024
"""Longer bodies are parsed and tokenized in a thread, to keep the event loop responsive."""


class HasTokens(Protocol):
    """A parsed body whose tokens are known."""

    @property
    def num_prompt_tokens(self) -> int: ...


Parsed = TypeVar("Parsed")
Counted = TypeVar("Counted", bound=HasTokens)
Parser = Callable[[dict[str, Any], Context], Parsed]


async def generate(
    request: Request,
    context: Context,
    parse: Parser[ParsedRequest],
    endpoint: EndpointFormat,
    max_inline_bytes: int = MAX_INLINE_BYTES,
) -> Response:
    """Read and parse a body, generate, and respond; once for each Idempotency-Key.

    Raises ParameterError, EngineStoppedError, ApiError.
    """
    return await once(
        request,
        context,
        lambda each: _generate(each, context, parse, endpoint, max_inline_bytes),
    )


async def once(request: Request, context: Context, answer: Answering) -> Response:
    """What `answer` responds, or has responded to the request's Idempotency-Key.

    Raises ApiError, SessionError and what `answer` raises.
    """
    if key_of(request) is None:
        return await answer(request)
    held = context.bodies.body(request)
    raw = await read_body(request, context.max_body_bytes, context.pace, held)
    held.release()  # who executes it counts it again
    return await context.keys.respond(request, raw, owner_of(request), answer)


async def _generate(
    request: Request,
    context: Context,
    parse: Parser[ParsedRequest],
    endpoint: EndpointFormat,
    max_inline_bytes: int,
) -> Response:
    parsed, arrived_at = await read_request(request, context, parse, max_inline_bytes)
    context.limits.check(parsed)
    parsed.check_items(context.config.max_response_items)
    context.bodies.response(request).at_least(parsed.num_items)
    deadline = deadline_of(arrived_at, context.config, parsed.body.timeout)
    body = parsed.body
    name, cancellation = open_request(
        request, context, endpoint.id_prefix, body.request_id, body.session_id
    )
    try:
        if parsed.turn is not None:
            caller = caller_of(request)
            return TurnResponse(context, parsed, endpoint, name, caller, deadline, cancellation)
        return await _respond(request, context, parsed, endpoint, name, deadline, cancellation)
    except BaseException:
        cancellation.end()
        raise


def open_request(
    request: Request,
    context: Context,
    id_prefix: str,
    chosen_id: str | None,
    session_id: str | None = None,
) -> tuple[str, Cancellation]:
    """The id of a request's answer, and how the request is cancelled by it. Raises ApiError 409.

    chosen_id: the `request_id` of its body. Where several servers have the session, the answer's id
    has its id as well: any of them finds the request by it.
    """
    request_id = chosen_id or request_id_of(request)
    routed = request_id
    if session_id is not None and context.is_one_of_many:
        routed = f"{session_id}.{request_id}"
    name = f"{id_prefix}-{routed}"
    cancellation = context.running.open(
        owner_of(request), name, request_id, is_chosen=chosen_id is not None
    )
    request_record(request.scope).response_id = name
    return name, cancellation


async def read_request(
    request: Request,
    context: Context,
    parse: Parser[Counted],
    max_inline_bytes: int = MAX_INLINE_BYTES,
) -> tuple[Counted, float]:
    """The parsed body, and the event loop time at which all of it had arrived."""
    engine = context.engine
    engine.check_accepting()
    queue = engine.admission_queue
    owner = owner_of(request)
    queue.check(1, queue.estimate_tokens(announced_bytes(request)), owner)
    raw = await _read(request, context)
    request.scope["state"]["raw_body"] = raw  # a turn that goes on is journaled with it
    arrived_at = asyncio.get_running_loop().time()
    async with AsyncExitStack() as stack:
        stack.enter_context(queue.tokenizing(len(raw), owner))
        if len(raw) <= max_inline_bytes:
            parsed = parse(parse_object(raw), context)
        else:
            wait_until = deadline_of(arrived_at, context.config)
            await _wait_turn(stack, request, context, len(raw), wait_until)
            fields = await asyncio.to_thread(parse_object, raw)
            deadline = deadline_of(arrived_at, context.config, timeout_of(fields))
            work = _parse_in_thread(fields, context, parse, stack.pop_all())
            parsed = await wait_for_client(deadline, request.receive, work)
    queue.record_tokens(len(raw), parsed.num_prompt_tokens)
    return parsed, arrived_at


async def _parse_in_thread(
    fields: dict[str, Any], context: Context, parse: Parser[Parsed], place: AsyncExitStack
) -> Parsed:
    """The parsed body; `place` in the admission queue is left when the thread is done."""
    async with place:
        return await asyncio.to_thread(parse, fields, context)


async def _wait_turn(
    place: AsyncExitStack,
    request: Request,
    context: Context,
    num_bytes: int,
    deadline: float | None,
) -> None:
    """Enter `place` into the turn to process a body.

    Raises ApiError 504 at the deadline; OutputStreamClosed where the client leaves.
    """
    turn = context.bodies.turn(request, num_bytes)
    waiting = asyncio.create_task(place.enter_async_context(turn))
    try:
        await before_deadline(deadline, until_done(waiting, request.receive))
    finally:
        waiting.cancel()


async def _read(request: Request, context: Context) -> bytes:
    """The JSON body, which is not parsed yet."""
    held = context.bodies.body(request)
    return await read_body(request, context.max_body_bytes, context.pace, held)


async def _respond(
    request: Request,
    context: Context,
    parsed: ParsedRequest,
    endpoint: EndpointFormat,
    name: str,
    deadline: float | None,
    cancellation: Cancellation,
) -> Response:
    """Generate without a session, and respond."""
    start = None if parsed.start is None else settled(parsed.start, parsed, context)
    generation_request = (
        parsed.build()
        if start is None
        else parsed.build_turn(start, context.tokenizer, context.policies)
    )
    is_stream = generation_request.is_stream
    header = endpoint.header(name, context.model_name, is_stream=is_stream)
    choices = endpoint.formatter(generation_request, context.tokenizer)
    count_choices(request.scope, generation_request)
    stream = await context.engine.generate(
        name,
        generation_request,
        start=start,
        deadline=deadline,
        cache=parsed.cache_use(owner_of(request)) if start is None else None,
        client=client_of(request.scope),
    )
    cancellation.attach(stream)
    track(request.scope, generation_request, stream)
    returned = StateWriter(context.sessions) if parsed.body.return_state else None
    if is_stream:
        formatter = EventFormatter(header, choices, generation_request, stream)
        keep_alive = context.config.sse_keep_alive_seconds
        if returned is not None:
            return EventStreamResponse(StateEvents(stream, formatter, returned), keep_alive)
        events = GenerationEvents(stream, formatter)
        return EventStreamResponse(events, keep_alive, on_writer=events.write_with)
    async with close_on_disconnect(stream, request.receive):
        deltas = await collect_outputs(stream)
        usage = usage_of(
            generation_request.num_prompt_tokens, stream.num_generated, stream.num_cached
        )
        extra: JsonObject = {}
        if generation_request.timings:
            extra["timings"] = timings_of(generation_request, stream)
        if returned is not None:
            extra["state"] = await returned.write(deltas[0].state)
        return format_response(deltas, header, choices, generation_request, usage, extra)


def start_of(body: SamplingBody, context: Context) -> "SessionState | None":
    """The state that a client sends, or an empty one where it asks for one; else None.

    Raises ApiError, and ParameterError for a state that no request can continue on this server.
    """
    if body.state is not None:
        limit, check = context.max_snapshot_bytes, context.policies.check_goes_on
        return read_state(body.state, context.sessions, limit, check)
    return context.policies.new_session(None) if body.return_state else None


def state_bytes(body: SamplingBody, context: Context) -> int:
    """Bytes of the largest state that the answer may have; 0 for none."""
    return encoded_length(context.sessions.max_snapshot_nbytes) if body.return_state else 0


def settled(start: "SessionState", parsed: ParsedRequest, context: Context) -> "SessionState":
    """The state under the context policy that the request asks for. Raises ApiError 409."""
    try:
        return context.policies.settled(start, parsed.params)
    except ContextPolicyError as error:
        message, code = str(error), "context_policy_settled"
        raise ApiError(409, message, param="context_policy", code=code) from None


async def read_parsed(
    request: Request,
    context: Context,
    parse: Parser[Parsed],
    max_inline_bytes: int = MAX_INLINE_BYTES,
) -> Parsed:
    """The body as `parse` returns it; bodies above `max_inline_bytes` are parsed in a thread."""
    raw = await _read(request, context)
    if len(raw) <= max_inline_bytes:
        return parse(parse_object(raw), context)
    async with AsyncExitStack() as stack:
        await _wait_turn(stack, request, context, len(raw), None)
        return await asyncio.to_thread(lambda: parse(parse_object(raw), context))


async def read_empty(request: Request, context: Context) -> None:
    """For an endpoint without fields: the body must be empty or an object without fields."""
    if raw := await _read(request, context):
        validate(RequestModel, parse_object(raw))


def check_model(requested: str | None, context: Context) -> None:
    """Raise ApiError 404 unless the requested model is the served one, or none."""
    if requested not in (None, context.model_name):
        raise unknown_model(requested, context.model_name)


def unknown_model(requested: str | None, served: str) -> ApiError:
    """The ApiError 404 for a model that is not served."""
    message = f"there is no model {shown(requested)}; this server's model is {shown(served)}"
    return ApiError(404, message, param="model", code="model_not_found")

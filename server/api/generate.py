"""From an order to an answer, whole or streamed, whichever endpoint it came to.

Owns which way an answer goes. Does not know what a body may hold.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request, Response

from cottention.server.api.dependencies import Context
from cottention.server.api.turn_response import TurnResponse
from cottention.server.config import ServerConfig
from cottention.server.generation.request import GenerationRequest
from cottention.server.generation.responses import EndpointFormat, told_whole, whole_pieces
from cottention.server.generation.sse import Events, EventStream, closing, usage_of
from cottention.server.http.body import announced_bytes, parse_object, read_body, shown
from cottention.server.http.errors import ApiError
from cottention.server.http.request_id import request_id_of
from cottention.server.limits.rate_limit import track
from cottention.server.schemas.base import Body, checked
from cottention.server.sessions.turn_queue import caller_of, owner_of

QUICK_BODY_BYTES = 16 * 1024
"""Longer bodies are parsed and tokenised in a thread; shorter ones would only wait for it."""


Found = TypeVar("Found")
RequestReader = Callable[[dict[str, Any], Context], Found]


async def read_order(
    request: Request,
    context: Context,
    read: RequestReader[GenerationRequest],
    max_quick: int = QUICK_BODY_BYTES,
) -> GenerationRequest:
    """The order in a request's body, whose time begins when all of that has come."""
    bridge = context.bridge
    bridge.check_accepting()
    bridge.line.check(1, bridge.line.estimate(announced_bytes(request)))
    raw = await read_body(request, context.max_body_bytes, context.config.receive_seconds)
    began = asyncio.get_running_loop().time()
    with bridge.line.reading(len(raw)):
        order = await _read(raw, context, read, max_quick)
    bridge.line.learn(len(raw), order.num_prompt)
    context.limits.check(order)
    return replace(order, deadline=deadline_of(order, context.config, began))


async def read_body_with(
    request: Request,
    context: Context,
    read: RequestReader[Found],
    max_quick: int = QUICK_BODY_BYTES,
) -> Found:
    """What `read` finds in a request's body; those of more bytes are read beside the loop."""
    raw = await read_body(request, context.max_body_bytes, context.config.receive_seconds)
    return await _read(raw, context, read, max_quick)


async def read_nothing(request: Request, context: Context) -> None:
    """For a verb that takes no field: the body is empty, or an object that says nothing."""
    if raw := await read_body(request, context.max_body_bytes, context.config.receive_seconds):
        checked(Body, parse_object(raw))


async def _read(raw: bytes, context: Context, read: RequestReader[Found], max_quick: int) -> Found:
    if len(raw) <= max_quick:
        return read(parse_object(raw), context)
    return await asyncio.to_thread(lambda: read(parse_object(raw), context))


async def answer(
    request: Request, context: Context, order: GenerationRequest, kind: EndpointFormat
) -> Response:
    """Have an order carried out. Raises ParameterError, EngineStoppedError, ApiError."""
    name = f"{kind.prefix}-{order.request_id or request_id_of(request)}"
    if order.turn is not None:
        return TurnResponse(context, order, kind, name, caller_of(request))
    heading = kind.heading(name, order, context.model_name)
    choices = kind.choices(order, context.bridge.engine.tokenizer)
    scope = f"{owner_of(request)}\n{order.cache_scope}"
    reading = await context.bridge.open(name, replace(order, cache_scope=scope))
    track(request.scope, order, reading)
    if order.is_stream:
        events = Events(heading, choices, order)
        return EventStream(reading, events, context.config.sse_keep_alive_seconds)
    async with closing(reading, request.receive):
        pieces = await whole_pieces(reading)
        usage = usage_of(order.num_prompt, reading.num_generated, reading.num_cached)
        return await told_whole(pieces, heading, choices, order, usage, {})


def deadline_of(order: GenerationRequest, config: ServerConfig, began: float) -> float | None:
    """Of the request's own timeout and the server's, by the event loop's clock as `began` is."""
    given = (order.timeout, config.max_request_seconds)
    seconds = min((each for each in given if each is not None), default=None)
    return None if seconds is None else began + seconds


def check_model(asked: str | None, context: Context) -> None:
    """Raise the 404 for a model that is not here."""
    if asked not in (None, context.model_name):
        raise unknown_model(asked, context.model_name)


def unknown_model(asked: str | None, served: str) -> ApiError:
    """What a client is told that asks for another model."""
    message = f"there is no model {shown(asked)}; this server's model is {shown(served)}"
    return ApiError(404, message, param="model", code="model_not_found")

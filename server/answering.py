"""From an order to an answer, whole or streamed, whichever endpoint it came to.

Owns an answer's heading and the order of its parts. Does not know what a body may hold.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from engine.outputs import FinishReason
from server.best import best_choices
from server.body import parse_object, read_body, shown
from server.choices import Choices
from server.context import Context
from server.errors import ApiError, engine_failed
from server.orders import QUICK_IDS, Order
from server.reading import Reading
from server.request_ids import request_id_of
from server.streaming import Events, EventStream, Heading, closing, usage_of

QUICK_BODY_BYTES = 16 * 1024
"""Longer bodies are parsed and tokenised in a thread; shorter ones would only wait for it."""


Found = TypeVar("Found")
Read = Callable[[dict[str, Any], Context], Found]


@dataclass(frozen=True, slots=True)
class Kind:
    """What sets an endpoint's answers apart."""

    prefix: str
    whole: str
    chunk: str
    choices: type[Choices]


async def read_order(
    request: Request, context: Context, read: Read[Order], max_quick: int = QUICK_BODY_BYTES
) -> Order:
    """The order in a request's body."""
    context.bridge.check_accepting()
    return await read_body_with(request, context, read, max_quick)


async def read_body_with(
    request: Request, context: Context, read: Read[Found], max_quick: int = QUICK_BODY_BYTES
) -> Found:
    """What `read` finds in a request's body; those of more bytes are read beside the loop."""
    raw = await read_body(request, context.config.max_body_bytes)
    if len(raw) <= max_quick:
        return read(parse_object(raw), context)
    return await asyncio.to_thread(lambda: read(parse_object(raw), context))


async def answer(request: Request, context: Context, order: Order, kind: Kind) -> Response:
    """Have an order carried out. Raises ParameterError, EngineStoppedError, ApiError."""
    name = f"{kind.prefix}-{order.request_id or request_id_of(request)}"
    heading = Heading(
        name, kind.chunk if order.is_stream else kind.whole, int(time.time()), context.model_name
    )
    choices = kind.choices(order, context.bridge.engine.tokenizer)
    reading = await context.bridge.open(name, order)
    if order.is_stream:
        events = Events(heading, choices, order)
        return EventStream(reading, events, context.config.keep_alive_seconds)
    async with closing(reading, request.receive):
        return await _whole(reading, heading, choices, order)


async def _whole(reading: Reading, heading: Heading, choices: Choices, order: Order) -> Response:
    """Wait for the end, which is the first time a whole answer is read."""
    await reading.wait_ended()
    pieces = await reading.take()
    if any(piece.finish_reason is FinishReason.ERROR for piece in pieces.values()):
        raise engine_failed()
    usage = usage_of(order.num_prompt, reading.num_generated)

    def worded() -> Response:
        best = best_choices(pieces, order)
        told = [choices.whole(index, piece) for index, piece in best.items()]
        beside = choices.beside(best)
        return JSONResponse(asdict(heading) | {"choices": told, "usage": usage} | beside)

    return await asyncio.to_thread(worded) if usage["total_tokens"] > QUICK_IDS else worded()


def check_model(asked: str | None, context: Context) -> None:
    """Raise the 404 for a model that is not here."""
    if asked not in (None, context.model_name):
        raise unknown_model(asked, context.model_name)


def unknown_model(asked: str | None, served: str) -> ApiError:
    """What a client is told that asks for another model."""
    message = f"there is no model {shown(asked)}; this server's model is {shown(served)}"
    return ApiError(404, message, param="model", code="model_not_found")

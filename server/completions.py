"""POST /v1/completions: from a body to a reading, and from a reading to an answer.

Owns the order of the checks and the whole (unstreamed) answer. Events are `streaming.py`'s.
"""

import asyncio
import time
import uuid
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from engine.outputs import FinishReason
from engine.params import SamplingParams
from server.body import parse_object, read_body, shown
from server.context import Context, ContextDep
from server.errors import ApiError, engine_failed
from server.reading import Reading
from server.schemas import Completion, CompletionRequest, completion_request
from server.streaming import CompletionEvents, EventStream, Heading, closing, usage_of

router = APIRouter()

QUICK_BODY_BYTES = 16 * 1024
"""Longer bodies are parsed and tokenised in a thread; shorter ones would only wait for it."""

_REQUEST_BODY = {
    "required": True,
    "content": {"application/json": {"schema": CompletionRequest.model_json_schema()}},
}


@dataclass(frozen=True, slots=True)
class Order:
    """A checked request, ready for the engine."""

    request: CompletionRequest
    params: SamplingParams
    prompts: list[list[int]]

    @property
    def num_prompt(self) -> int:
        """Ids of all prompts."""
        return sum(map(len, self.prompts))


@router.post(
    "/v1/completions",
    response_model=Completion,
    openapi_extra={"requestBody": _REQUEST_BODY},
)
async def create_completion(request: Request, context: ContextDep) -> Response:
    """Continue one prompt or several, whole or as a stream of events."""
    context.bridge.check_accepting()
    raw = await read_body(request, context.config.max_body_bytes)
    order = await _order(raw, context)
    heading = Heading(
        f"cmpl-{uuid.uuid4().hex}", "text_completion", int(time.time()), context.model_name
    )
    reading = context.bridge.open(heading.id, order.prompts, order.params)
    if order.request.stream:
        return _stream(reading, heading, order, context)
    async with closing(reading, request.receive):
        return await _whole(reading, heading, order)


async def _order(raw: bytes, context: Context) -> Order:
    if len(raw) <= QUICK_BODY_BYTES:
        return _read_order(raw, context)
    return await asyncio.to_thread(_read_order, raw, context)


def _read_order(raw: bytes, context: Context) -> Order:
    """Parse, check and tokenise. Raises ApiError, ParameterError."""
    request = completion_request(parse_object(raw))
    if request.model not in (None, context.model_name):
        raise unknown_model(request.model, context.model_name)
    params = request.sampling_params()
    encode = context.bridge.engine.tokenizer.encode
    prompts = [encode(each) if isinstance(each, str) else each for each in request.prompt]
    return Order(request, params, prompts)


def unknown_model(asked: str, served: str) -> ApiError:
    """The 404 for a model that is not here."""
    message = f"there is no model {shown(asked)}; this server's model is {shown(served)}"
    return ApiError(404, message, param="model", code="model_not_found")


def _stream(reading: Reading, heading: Heading, order: Order, context: Context) -> EventStream:
    options = order.request.stream_options
    events = CompletionEvents(heading, options is not None and options.include_usage)
    return EventStream(reading, events, order.num_prompt, context.config.keep_alive_seconds)


async def _whole(reading: Reading, heading: Heading, order: Order) -> Response:
    """Wait for the end, which is the first time a whole answer is read."""
    await reading.wait_ended()
    pieces = await reading.take()
    if any(piece.finish_reason is FinishReason.ERROR for piece in pieces.values()):
        raise engine_failed()
    choices: list[dict[str, Any]] = [
        {"index": index, "text": piece.text, "logprobs": None, "finish_reason": piece.finish_reason}
        for index, piece in sorted(pieces.items())
    ]
    usage = usage_of(order.num_prompt, reading)
    return JSONResponse(asdict(heading) | {"choices": choices, "usage": usage})

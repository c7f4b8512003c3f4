"""From an HTTP request to an encoder's answer: what /v1/embeddings and /v1/fill-mask share."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from cottention.engine.encoding import Encoded, EncodeParams
from cottention.engine.sampling_params import SamplingParams, out_of_vocabulary
from cottention.server.api.dependencies import Context
from cottention.server.api.generate import Parser, open_request, read_request
from cottention.server.generation.cancellation import request_cancelled
from cottention.server.generation.deadline import deadline_of
from cottention.server.generation.request import GenerationRequest, OutputOptions, encode_text
from cottention.server.generation.responses import collect_outputs
from cottention.server.generation.sse import close_on_disconnect
from cottention.server.http.errors import engine_failed, invalid
from cottention.server.limits.rate_limit import client_of, track
from cottention.server.schemas.encoding import EncodingBody
from cottention.server.schemas.responses import JsonObject

FLOAT_BYTES = 4

NUMBERS_PER_ITEM = 4
"""A number of an embedding takes a fourth of what a log-probability with its token does."""

Body = TypeVar("Body", bound=EncodingBody)


@dataclass(frozen=True, slots=True)
class ParsedEncoding(Generic[Body]):
    """A validated body, its texts' token ids, and what is asked of them."""

    body: Body
    ids: list[list[int]]
    params: EncodeParams

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(map(len, self.ids))


Format = Callable[[ParsedEncoding[Body], Sequence[Encoded], Context], list[JsonObject]]
"""(what was asked, the answers, context) → the entries of the response's `data`."""


async def encode(
    request: Request,
    context: Context,
    parse: Parser[ParsedEncoding[Body]],
    id_prefix: str,
    format_data: Format[Body],
) -> Response:
    """Read and parse a body, compute, and respond.

    Raises ParameterError, EngineStoppedError, ApiError.
    """
    parsed, arrived_at = await read_request(request, context, parse)
    body = parsed.body
    params = SamplingParams(max_tokens=0, encode=parsed.params)
    asked = GenerationRequest(
        parsed.ids, params, OutputOptions(), [""] * len(parsed.ids), priority=body.priority
    )
    deadline = deadline_of(arrived_at, context.config, body.timeout)
    name, cancellation = open_request(request, context, id_prefix, body.request_id)
    try:
        stream = await context.engine.generate(
            name, asked, deadline=deadline, client=client_of(request.scope)
        )
    except BaseException:
        cancellation.end()
        raise
    cancellation.attach(stream)
    track(request.scope, asked, stream)
    async with close_on_disconnect(stream, request.receive):
        deltas = await collect_outputs(stream)
    found = [deltas[place].encoded for place in range(len(parsed.ids))]
    answers = [each for each in found if each is not None]
    if len(answers) != len(found):
        raise request_cancelled() if stream.was_cancelled else engine_failed()
    num_items = sum(map(_num_items, answers))
    if num_items > context.config.max_response_items:
        message = (
            f"the response would count as {num_items} items, and it may have at most"
            f" {context.config.max_response_items} (--max-response-items): send fewer texts"
        )
        raise invalid("input", message)
    context.bodies.response(request).at_least(num_items)

    def respond() -> Response:
        num_tokens = parsed.num_prompt_tokens
        fields = {
            "id": name,
            "object": "list",
            "created": int(time.time()),
            "model": context.model_name,
            "data": format_data(parsed, answers, context),
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
        return JSONResponse(fields)

    return await asyncio.to_thread(respond)


def _num_items(answer: Encoded) -> int:
    """What an answer counts as, among token ids and log-probabilities of other responses."""
    num_numbers = len(answer.embedding) // FLOAT_BYTES
    num_predictions = sum(len(mask.tokens) for mask in answer.masks)
    return -(-num_numbers // NUMBERS_PER_ITEM) + num_predictions


def token_ids(
    inputs: Sequence[str | list[int]], context: Context, *, add_special_tokens: bool
) -> list[list[int]]:
    """The ids of each text; ids are taken as they are. Raises ApiError 400 naming `input`."""
    tokenizer, most = context.tokenizer, context.max_text_tokens
    found = []
    for place, each in enumerate(inputs):
        ids = each
        if isinstance(each, str):
            ids = encode_text(each, tokenizer, add_special_tokens=add_special_tokens)
        assert not isinstance(ids, str)
        which = "input" if len(inputs) == 1 else f"input at index {place}"
        if not ids:
            raise invalid("input", f"{which} must hold at least one token; it has none")
        if not 0 <= min(ids) <= max(ids) < tokenizer.num_ids:
            raise invalid("input", out_of_vocabulary(f"ids in {which}", ids, tokenizer.num_ids))
        if len(ids) > most:
            message = (
                f"{which} must have at most {most} tokens, special tokens included, which is what"
                f" the model can read; it has {len(ids)}: shorten it"
            )
            raise invalid("input", message)
        found.append(ids)
    return found

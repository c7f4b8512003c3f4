"""POST /v1/messages and /v1/messages/count_tokens: chats in Anthropic's shapes."""

import json
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cottention.engine.errors import ParameterError
from cottention.server.api.chat import ALWAYS_IN_THREAD, parse_chat
from cottention.server.api.dependencies import Context, ContextDep
from cottention.server.api.generate import once, open_request, read_parsed, read_request
from cottention.server.api.openapi import error_responses, request_docs
from cottention.server.generation.deadline import deadline_of
from cottention.server.generation.json_pieces import object_response
from cottention.server.generation.request import MAX_INLINE_TOKENS, ParsedRequest
from cottention.server.generation.responses import collect_outputs
from cottention.server.generation.sse import EventStreamResponse, close_on_disconnect
from cottention.server.http.errors import ApiError, invalid
from cottention.server.http.request_id import request_id_of
from cottention.server.limits.rate_limit import client_of, track
from cottention.server.responses.messages import MessageEvents, MessageWriter, error_body
from cottention.server.schemas.base import validate
from cottention.server.schemas.messages import (
    CHAT_NAMES,
    PATH,
    CountTokensRequest,
    MessagesRequest,
)
from cottention.server.schemas.responses import JsonObject
from cottention.server.sessions.turn_queue import owner_of

router = APIRouter()

MESSAGES = [{"role": "user", "content": "Write a loop."}]


class MessageObject(BaseModel):
    """A message."""

    id: str
    type: str
    role: str
    model: str
    content: list[JsonObject]
    stop_reason: str | None
    stop_sequence: str | None
    usage: JsonObject


class TokenCount(BaseModel):
    """How many tokens a request's prompt has."""

    input_tokens: int


@router.post(
    PATH,
    response_model=MessageObject,
    **request_docs(
        MessagesRequest,
        examples=[{"messages": MESSAGES, "max_tokens": 8}],
        streams=True,
        more=error_responses(403, 409),
        is_idempotent=True,
    ),
)
async def create_message(request: Request, context: ContextDep) -> Response:
    """Answer the last of some messages; the response is whole or a stream of events."""
    return await once(request, context, lambda each: _create(each, context))


async def _create(request: Request, context: Context) -> Response:
    parsed, arrived_at = await read_request(request, context, _parse, ALWAYS_IN_THREAD)
    context.limits.check(parsed)
    context.bodies.response(request).at_least(parsed.num_items)
    deadline = deadline_of(arrived_at, context.config)
    name, cancellation = open_request(request, context, "msg", None)
    try:
        generation = parsed.build()
        try:
            stream = await context.engine.generate(
                name,
                generation,
                deadline=deadline,
                cache=parsed.cache_use(owner_of(request)),
                client=client_of(request.scope),
            )
        except ParameterError as error:
            raise _renamed(invalid(error.param, str(error))) from None
    except BaseException:
        cancellation.end()
        raise
    cancellation.attach(stream)
    track(request.scope, generation, stream)
    writer = MessageWriter(f"msg_{request_id_of(request)}", context.model_name, generation)
    if generation.is_stream:
        events = MessageEvents(stream, writer)
        keep_alive = context.config.sse_keep_alive_seconds
        return EventStreamResponse(events, keep_alive, on_writer=events.write_with)
    async with close_on_disconnect(stream, request.receive):
        deltas = await collect_outputs(stream)
        writer.add(deltas[0])
        writer.end(deltas[0], stream)
        is_long = stream.num_generated > MAX_INLINE_TOKENS
        return object_response(writer.message, is_long=is_long)


@router.post(
    f"{PATH}/count_tokens",
    response_model=TokenCount,
    **request_docs(
        CountTokensRequest, examples=[{"messages": MESSAGES}], more=error_responses(403)
    ),
)
async def count_tokens(request: Request, context: ContextDep) -> JsonObject:
    """The tokens of the prompt that these messages are."""
    parsed = await read_parsed(request, context, _parse_to_count, ALWAYS_IN_THREAD)
    return {"input_tokens": parsed.num_prompt_tokens}


def _parse(fields: dict[str, Any], context: Context) -> ParsedRequest:
    return _as_chat(validate(MessagesRequest, fields), context)


def _parse_to_count(fields: dict[str, Any], context: Context) -> ParsedRequest:
    return _as_chat(validate(CountTokensRequest, fields), context)


def _as_chat(body: CountTokensRequest, context: Context) -> ParsedRequest:
    fields = {name: each for name, each in body.as_chat().items() if each is not None}
    try:
        return parse_chat(fields, context)
    except ApiError as error:
        raise _renamed(error) from None


def _renamed(error: ApiError) -> ApiError:
    """An error of a chat's fields, with the names that they have here."""
    message, param = str(error), error.param
    if param is not None and param in CHAT_NAMES:
        message = message.replace(param, CHAT_NAMES[param])
        param = CHAT_NAMES[param]
    message = message.replace(".function.parameters", ".input_schema").replace(".function.", ".")
    return ApiError(error.status, message, param=param, code=error.code, headers=error.headers)


class MessagesErrorMiddleware:
    """Gives the errors of these endpoints Anthropic's form, wherever they come from."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or not is_messages_path(scope["path"]):
            await self._app(scope, receive, send)
            return
        start: Message | None = None
        body = b""

        async def sending(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start" and message["status"] >= 400:
                start = message
            elif start is None:
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    await _send_error(start, body, scope, send)

        await self._app(scope, receive, sending)


def is_messages_path(path: str) -> bool:
    """Whether it is one of these endpoints."""
    return path in (PATH, f"{PATH}/count_tokens")


async def _send_error(start: Message, body: bytes, scope: Scope, send: Send) -> None:
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):  # the answer to a client that has left
        message = ""
    request_id = scope.get("state", {}).get("request_id")
    raw = json.dumps(error_body(start["status"], message, request_id)).encode()
    headers = [
        (name, str(len(raw)).encode() if name.lower() == b"content-length" else value)
        for name, value in start["headers"]
    ]
    if "content-length" not in Headers(raw=headers):
        headers.append((b"content-length", str(len(raw)).encode()))
    await send({**start, "headers": headers})
    await send({"type": "http.response.body", "body": raw})

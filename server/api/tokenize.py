"""POST /tokenize and /detokenize, in vLLM's shapes."""

from collections.abc import Mapping
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response
from pydantic import Field

from cottention.server.api.chat import (
    ALWAYS_IN_THREAD,
    control_tokens,
    encode_chat,
    render,
    template_of,
    with_tools,
)
from cottention.server.api.dependencies import Context, ContextDep
from cottention.server.api.generate import check_model, read_parsed
from cottention.server.api.openapi import request_docs
from cottention.server.generation.json_pieces import (
    TEXT_CHARACTERS,
    LongList,
    object_response,
)
from cottention.server.generation.request import MAX_INLINE_ITEMS, decode_ids, encode_text
from cottention.server.schemas.base import RequestModel, validate
from cottention.server.schemas.chat import (
    RenderedMessages,
    check_generation_prompt,
    unknown_keys,
)
from cottention.server.schemas.field_types import ShortText, Text, TokenIds
from cottention.server.schemas.responses import Detokenized, JsonObject, Tokenized
from cottention.server.schemas.sampling import BOOLEAN, IDS, MODEL
from cottention.server.schemas.unsupported import TOKENIZE, NeutralValues

router = APIRouter()


class TokenizeRequest(RequestModel):
    """Body of POST /tokenize for a text."""

    model: ShortText | None = Field(None, description=MODEL)
    prompt: Text = Field(description="a string, unless there are messages")
    add_special_tokens: bool = Field(True, description=BOOLEAN)
    return_token_strs: bool = Field(False, description=BOOLEAN)


class TokenizeChatRequest(RenderedMessages):
    """Body of POST /tokenize for a chat."""

    neutral: ClassVar[NeutralValues] = TOKENIZE

    model: ShortText | None = Field(None, description=MODEL)
    add_special_tokens: bool = Field(False, description=BOOLEAN)
    return_token_strs: bool = Field(False, description=BOOLEAN)


class DetokenizeRequest(RequestModel):
    """Body of POST /detokenize."""

    model: ShortText | None = Field(None, description=MODEL)
    tokens: TokenIds = Field(description=IDS)


@router.post(
    "/tokenize",
    response_model=Tokenized,
    **request_docs(TokenizeRequest, TokenizeChatRequest, examples=[{"prompt": "def f(x):"}]),
)
async def tokenize(request: Request, context: ContextDep) -> Response:
    """Token ids of a text, or of messages rendered by the chat template."""
    fields = await read_parsed(request, context, _tokenized, ALWAYS_IN_THREAD)
    return object_response(fields, is_long=fields["count"] > MAX_INLINE_ITEMS)


@router.post(
    "/detokenize",
    response_model=Detokenized,
    **request_docs(DetokenizeRequest, examples=[{"tokens": [70, 71]}]),
)
async def detokenize(request: Request, context: ContextDep) -> Response:
    """The text of token ids, special tokens included."""
    fields = await read_parsed(request, context, _detokenized)
    return object_response(fields, is_long=len(fields["prompt"]) > TEXT_CHARACTERS)


def _tokenized(body: Mapping[str, Any], context: Context) -> JsonObject:
    tokenizer = context.tokenizer
    if body.get("messages") is not None:
        chat = validate(TokenizeChatRequest, body)
        check_generation_prompt(chat)
        check_model(chat.model, context)
        template = template_of(context)
        context.ignored_keys.warn(unknown_keys(body["messages"]))
        control = control_tokens(context, template)
        messages, _ = with_tools(chat.messages, template, None)
        rendered = render(template, chat, control, messages)
        ids = encode_chat(rendered, tokenizer, control, add_special_tokens=chat.add_special_tokens)
        return _response(ids, chat.return_token_strs, context)
    request = validate(TokenizeRequest, body)
    check_model(request.model, context)
    ids = encode_text(request.prompt, tokenizer, add_special_tokens=request.add_special_tokens)
    return _response(ids, request.return_token_strs, context)


def _response(ids: list[int], with_strings: bool, context: Context) -> JsonObject:
    tokenizer, length = context.tokenizer, context.trained_length
    strings = LongList(map(tokenizer.id_to_token, ids)) if with_strings else None
    return {"count": len(ids), "max_model_len": length, "tokens": ids, "token_strs": strings}


def _detokenized(body: Mapping[str, Any], context: Context) -> JsonObject:
    request = validate(DetokenizeRequest, body)
    check_model(request.model, context)
    return {"prompt": decode_ids(list(request.tokens), context.tokenizer, "tokens")}

"""POST /tokenize and /detokenize, in vLLM's shapes. Knows no engine beyond its tokenizer."""

from collections.abc import Mapping
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from cottention.server.api.chat import ALWAYS_IN_THREAD, render, template_of
from cottention.server.api.dependencies import Context, ContextDep
from cottention.server.api.generate import check_model, read_parsed
from cottention.server.api.openapi import described
from cottention.server.generation.request import decode_ids, encode_text
from cottention.server.schemas.base import Body, checked
from cottention.server.schemas.chat import MESSAGES, Messages
from cottention.server.schemas.field_types import Text, TokenIds
from cottention.server.schemas.responses import Detokenized, JsonObject, Tokenized
from cottention.server.schemas.sampling import BOOLEAN, IDS
from cottention.server.schemas.unsupported import TOKENIZE, Neutral

router = APIRouter()

MODEL = "a string, an id from /v1/models"


class TokenizeRequest(Body):
    """Body of POST /tokenize for a text."""

    model: Text | None = Field(None, description=MODEL)
    prompt: Text = Field(description="a string, or messages must be there")
    add_special_tokens: bool = Field(True, description=BOOLEAN)
    return_token_strs: bool = Field(False, description=BOOLEAN)


class TokenizeChatRequest(Body):
    """Body of POST /tokenize for a chat."""

    neutral: ClassVar[Neutral] = TOKENIZE

    model: Text | None = Field(None, description=MODEL)
    messages: Messages = Field(description=MESSAGES)
    add_generation_prompt: bool = Field(True, description=BOOLEAN)
    add_special_tokens: bool = Field(False, description=BOOLEAN)
    chat_template_kwargs: dict[str, Any] = Field({}, description="an object")
    return_token_strs: bool = Field(False, description=BOOLEAN)


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    model: Text | None = Field(None, description=MODEL)
    tokens: TokenIds = Field(description=IDS)


@router.post(
    "/tokenize",
    response_model=Tokenized,
    **described(TokenizeRequest, TokenizeChatRequest, examples=[{"prompt": "def f(x):"}]),
)
async def tokenize(request: Request, context: ContextDep) -> Response:
    """Ids of a text, or of what the chat template makes of messages."""
    return JSONResponse(await read_parsed(request, context, _tokenized, ALWAYS_IN_THREAD))


@router.post(
    "/detokenize",
    response_model=Detokenized,
    **described(DetokenizeRequest, examples=[{"tokens": [70, 71]}]),
)
async def detokenize(request: Request, context: ContextDep) -> Response:
    """Text of ids, special tokens written out."""
    return JSONResponse(await read_parsed(request, context, _detokenized))


def _tokenized(body: Mapping[str, Any], context: Context) -> JsonObject:
    tokenizer = context.tokenizer
    if body.get("messages") is not None:
        chat = checked(TokenizeChatRequest, body)
        check_model(chat.model, context)
        more, opens = chat.chat_template_kwargs, chat.add_generation_prompt
        text = render(template_of(context), chat.messages, opens, more)
        ids = encode_text(text, tokenizer, add_special_tokens=chat.add_special_tokens)
        return _counted(ids, chat.return_token_strs, context)
    request = checked(TokenizeRequest, body)
    check_model(request.model, context)
    ids = encode_text(request.prompt, tokenizer, add_special_tokens=request.add_special_tokens)
    return _counted(ids, request.return_token_strs, context)


def _counted(ids: list[int], with_names: bool, context: Context) -> JsonObject:
    tokenizer, length = context.tokenizer, context.trained_length
    names = [tokenizer.token_text(each) for each in ids] if with_names else None
    return {"count": len(ids), "max_model_len": length, "tokens": ids, "token_strs": names}


def _detokenized(body: Mapping[str, Any], context: Context) -> JsonObject:
    request = checked(DetokenizeRequest, body)
    check_model(request.model, context)
    return {"prompt": decode_ids(list(request.tokens), context.tokenizer, "tokens")}

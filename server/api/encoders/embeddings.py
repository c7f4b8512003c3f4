"""POST /v1/embeddings."""

import base64
import struct
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from cottention.engine.encoding import Encoded, EncodeParams
from cottention.server.api.dependencies import Context, ContextDep
from cottention.server.api.encoders.encode import ParsedEncoding, encode, token_ids
from cottention.server.api.generate import check_model
from cottention.server.api.openapi import request_docs
from cottention.server.schemas.encoding import EmbeddingRequest, encoding_request
from cottention.server.schemas.encoding_responses import Embeddings
from cottention.server.schemas.responses import JsonObject

router = APIRouter()

EXAMPLES = ({"input": "a text"}, {"input": ["a", "b"], "encoding_format": "base64"})


@router.post(
    "/v1/embeddings",
    response_model=Embeddings,
    **request_docs(EmbeddingRequest, examples=EXAMPLES),
)
async def create_embeddings(request: Request, context: ContextDep) -> Response:
    """One vector for each text, of its last hidden states."""
    return await encode(request, context, _parse, "embd", _data)


def _parse(fields: dict[str, Any], context: Context) -> ParsedEncoding[EmbeddingRequest]:
    body = encoding_request(EmbeddingRequest, fields)
    check_model(body.model, context)
    ids = token_ids(body.input, context, add_special_tokens=body.add_special_tokens)
    return ParsedEncoding(body, ids, EncodeParams())


def _data(
    parsed: ParsedEncoding[EmbeddingRequest], answers: Sequence[Encoded], _context: Context
) -> list[JsonObject]:
    is_base64 = parsed.body.encoding_format == "base64"
    write = _base64 if is_base64 else _floats
    return [
        {"object": "embedding", "index": index, "embedding": write(each.embedding)}
        for index, each in enumerate(answers)
    ]


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _floats(raw: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))

"""POST /v1/fill-mask."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from fastapi import APIRouter, Request, Response

from cottention.engine.encoding import MAX_PREDICTIONS, Encoded, EncodeParams, MaskPrediction
from cottention.server.api.dependencies import Context, ContextDep
from cottention.server.api.encoders.encode import ParsedEncoding, encode, token_ids
from cottention.server.api.generate import check_model
from cottention.server.api.openapi import request_docs
from cottention.server.http.body import shown
from cottention.server.http.errors import invalid
from cottention.server.schemas.encoding import TOP_K, FillMaskRequest, encoding_request
from cottention.server.schemas.encoding_responses import FilledMasks
from cottention.server.schemas.responses import JsonObject

if TYPE_CHECKING:  # it loads the tokenizers library, which is the engine's
    from cottention.engine.text.encoder_tokenizer import EncoderTokenizer

router = APIRouter()

EXAMPLES = ({"input": "the [MASK] sat on the mat", "top_k": 3},)


@router.post(
    "/v1/fill-mask",
    response_model=FilledMasks,
    **request_docs(FillMaskRequest, examples=EXAMPLES),
)
async def fill_mask(request: Request, context: ContextDep) -> Response:
    """The most probable tokens for each mask of each text."""
    return await encode(request, context, _parse, "fill", _data)


def _parse(fields: dict[str, Any], context: Context) -> ParsedEncoding[FillMaskRequest]:
    body = encoding_request(FillMaskRequest, fields)
    check_model(body.model, context)
    if not 1 <= body.top_k <= MAX_PREDICTIONS:
        raise invalid("top_k", f"top_k must be {TOP_K}; it is {shown(body.top_k)}")
    tokenizer = cast("EncoderTokenizer", context.tokenizer)
    ids = token_ids(body.input, context, add_special_tokens=body.add_special_tokens)
    for place, each in enumerate(ids):
        if tokenizer.mask_id not in each:
            which = "input" if len(ids) == 1 else f"input at index {place}"
            message = f"{which} must have the mask token {tokenizer.mask_token} in it"
            raise invalid("input", message)
    targets = None if body.targets is None else _targets(body.targets, tokenizer)
    params = EncodeParams(mask_id=tokenizer.mask_id, top_k=body.top_k, targets=targets)
    return ParsedEncoding(body, ids, params)


def _targets(targets: Sequence[str], tokenizer: "EncoderTokenizer") -> tuple[int, ...]:
    """The id of each target, which must be one token that the vocabulary has."""
    if not 1 <= len(targets) <= MAX_PREDICTIONS:
        message = f"targets must have 1 to {MAX_PREDICTIONS} tokens; it has {len(targets)}"
        raise invalid("targets", message)
    found = []
    for target in targets:
        token_id = tokenizer.token_id(target)
        if token_id is None:
            message = f"each of targets must be one token of the model; {shown(target)} is not"
            raise invalid("targets", message)
        found.append(token_id)
    return tuple(dict.fromkeys(found))


def _data(
    _parsed: ParsedEncoding[FillMaskRequest], answers: Sequence[Encoded], context: Context
) -> list[JsonObject]:
    return [
        {
            "object": "fill_mask",
            "index": index,
            "masks": [_mask(mask, context) for mask in each.masks],
        }
        for index, each in enumerate(answers)
    ]


def _mask(mask: MaskPrediction, context: Context) -> JsonObject:
    predictions = [
        {"token": token_id, "token_str": context.tokenizer.id_to_token(token_id), "score": score}
        for token_id, score in mask.tokens
    ]
    return {"position": mask.position, "predictions": predictions}

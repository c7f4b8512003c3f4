"""POST /v1/completions."""

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from cottention.server.api.dependencies import Context, ContextDep
from cottention.server.api.generate import check_model, generate, start_of, state_bytes
from cottention.server.api.openapi import error_responses, request_docs
from cottention.server.generation.choice_format import CompletionFormatter
from cottention.server.generation.request import (
    OutputOptions,
    ParsedRequest,
    decode_ids,
    encode_text,
    truncate_prompt,
)
from cottention.server.generation.responses import EndpointFormat
from cottention.server.schemas.completions import CompletionRequest, completion_request
from cottention.server.schemas.responses import Completion

if TYPE_CHECKING:
    from cottention.engine.text.base import BaseTokenizer

router = APIRouter()

COMPLETION = EndpointFormat("cmpl", "text_completion", "text_completion", CompletionFormatter)


EXAMPLES = (
    {"prompt": "def f(x):", "max_tokens": 8},
    {"prompt": ["a", "b"], "n": 2, "max_tokens": 8, "stream": True, "logprobs": 2, "echo": True},
)


@router.post(
    "/v1/completions",
    response_model=Completion,
    **request_docs(
        CompletionRequest,
        examples=EXAMPLES,
        streams=True,
        more=error_responses(403, 409, 412),
        is_idempotent=True,
    ),
)
async def create_completion(request: Request, context: ContextDep) -> Response:
    """Continue one prompt or several; the response is whole or a stream of events."""
    return await generate(request, context, parse_completion, COMPLETION)


def parse_completion(fields: dict[str, Any], context: Context) -> ParsedRequest:
    """Validate a body and tokenize its prompts. Raises ApiError, ParameterError."""
    body = completion_request(fields)
    check_model(body.model, context)
    params = body.sampling_params(context.default_sampling_params, context.max_tokens)
    tokenizer, length = context.tokenizer, context.trained_length
    prompts = [truncate_prompt(ids, body, length) for ids in _token_ids(body, tokenizer)]
    return ParsedRequest(
        body,
        params,
        _output_options(body, context),
        prompts,
        echoes=_echoes(body, prompts, tokenizer) if body.echo else (),
        add_special_tokens_if_empty=body.adds_special_tokens is None
        and isinstance(body.prompt[0], str),
        start=start_of(body, context),
    )


def _token_ids(body: CompletionRequest, tokenizer: "BaseTokenizer") -> list[list[int]]:
    add_special_tokens = bool(body.adds_special_tokens)
    return [
        encode_text(each, tokenizer, add_special_tokens=add_special_tokens)
        if isinstance(each, str)
        else each
        for each in body.prompt
    ]


def _output_options(body: CompletionRequest, context: Context) -> OutputOptions:
    return OutputOptions(
        echo=body.echo,
        logprobs=body.num_alternatives(body.logprobs),
        prompt_logprobs=body.prompt_logprobs,
        token_ids=body.return_token_ids,
        state_bytes=state_bytes(body, context),
        tokens_as_ids=body.return_tokens_as_token_ids,
    )


def _echoes(
    body: CompletionRequest, prompts: list[list[int]], tokenizer: "BaseTokenizer"
) -> list[str]:
    """The text of each prompt: as sent, or decoded if it was sent as ids or truncated."""
    is_whole = body.truncate_prompt_tokens is None
    return [
        given if isinstance(given, str) and is_whole else decode_ids(ids, tokenizer, "prompt")
        for given, ids in zip(body.prompt, prompts, strict=True)
    ]

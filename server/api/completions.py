"""POST /v1/completions: from a body to an order.

Owns the order of the checks. The answer is `answering.py`'s.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from cottention.server.api.dependencies import Context, ContextDep
from cottention.server.api.generate import answer, check_model, read_order
from cottention.server.api.openapi import described, refusals
from cottention.server.generation.choice_format import CompletionFormatter
from cottention.server.generation.request import (
    GenerationRequest,
    OutputOptions,
    cut_prompt,
    order_of,
    read_text,
    text_of,
)
from cottention.server.generation.responses import EndpointFormat
from cottention.server.limits.key_limits import least
from cottention.server.schemas.completions import CompletionRequest, completion_request
from cottention.server.schemas.responses import Completion

if TYPE_CHECKING:
    from cottention.engine.sampling_params import SamplingParams
    from cottention.engine.text.tokenizer import Tokenizer

router = APIRouter()

COMPLETION = EndpointFormat("cmpl", "text_completion", "text_completion", CompletionFormatter)


EXAMPLES = (
    {"prompt": "def f(x):", "max_tokens": 8},
    {"prompt": ["a", "b"], "n": 2, "max_tokens": 8, "stream": True, "logprobs": 2, "echo": True},
)


@router.post(
    "/v1/completions",
    response_model=Completion,
    **described(CompletionRequest, examples=EXAMPLES, streams=True, more=refusals(409, 412)),
)
async def create_completion(request: Request, context: ContextDep) -> Response:
    """Continue one prompt or several, whole or as a stream of events."""
    order = await read_order(request, context, read_completion)
    return await answer(request, context, order, COMPLETION)


def read_completion(body: dict[str, Any], context: Context) -> GenerationRequest:
    """Check and tokenise. Raises ApiError, ParameterError."""
    request = completion_request(body)
    check_model(request.model, context)
    params = _params(request, context)
    tokenizer = context.bridge.engine.tokenizer
    length = context.trained_length
    prompts = [cut_prompt(ids, request, length) for ids in _ids(request, tokenizer)]
    echoes = _echoes(request, prompts, tokenizer) if request.echo else ()
    order = order_of(request, params, _details(request), prompts, echoes)
    is_text = isinstance(request.prompt[0], str)
    return replace(order, frames_first=is_text and request.frames is None)


def _params(request: CompletionRequest, context: Context) -> "SamplingParams":
    """As asked; the default of max_tokens is no more than this key may have."""
    params = request.sampling_params()
    if "max_tokens" in request.model_fields_set:
        return params
    return replace(params, max_tokens=least(params.max_tokens, context.limits.max_tokens))


def _ids(request: CompletionRequest, tokenizer: "Tokenizer") -> list[list[int]]:
    is_framed = bool(request.frames)
    return [
        read_text(each, tokenizer, is_framed=is_framed) if isinstance(each, str) else each
        for each in request.prompt
    ]


def _details(request: CompletionRequest) -> OutputOptions:
    return OutputOptions(
        echo=request.echo,
        logprobs=request.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        token_ids=request.return_token_ids,
        tokens_as_ids=request.return_tokens_as_token_ids,
    )


def _echoes(
    request: CompletionRequest, prompts: list[list[int]], tokenizer: "Tokenizer"
) -> list[str]:
    """Each prompt's text as it was sent, or that of its ids where it was cut or sent as ids."""
    is_whole = request.truncate_prompt_tokens is None
    return [
        given if isinstance(given, str) and is_whole else text_of(ids, tokenizer, "prompt")
        for given, ids in zip(request.prompt, prompts, strict=True)
    ]

"""POST /v1/chat/completions: from messages to an order.

Owns the order of the checks, and what ends an answer that its client does not limit. The prompt is
`templates.py`'s, the answer `answering.py`'s.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from cottention.engine.errors import ParameterError
from cottention.engine.sampling_params import MAX_STOP_STRINGS, SamplingParams
from cottention.server.api.dependencies import Context, ContextDep
from cottention.server.api.generate import answer, check_model, read_order
from cottention.server.api.openapi import described, refusals
from cottention.server.generation.chat_template import (
    ChatContinuation,
    ChatTemplate,
    ChatTemplateError,
    Message,
    render_after,
)
from cottention.server.generation.choice_format import ChatFormatter
from cottention.server.generation.request import (
    GenerationRequest,
    OutputOptions,
    cut_prompt,
    order_of,
    read_text,
)
from cottention.server.generation.responses import EndpointFormat
from cottention.server.http.body import is_text
from cottention.server.http.errors import invalid
from cottention.server.schemas.chat import ChatRequest, chat_request
from cottention.server.schemas.responses import ChatCompletion

if TYPE_CHECKING:
    from cottention.engine.text.tokenizer import Tokenizer

router = APIRouter()

CHAT = EndpointFormat("chatcmpl", "chat.completion", "chat.completion.chunk", ChatFormatter)

NEVER_QUICK = 0
"""A template is a program of somebody else's: it runs beside the loop, however short the body."""

NO_TEMPLATE = (
    "this model has no chat template: start the server with --chat-template FILE, or with"
    " --chat-template plain for a plain one, or use /v1/completions"
)


MESSAGES = [{"role": "user", "content": "Write a loop."}]
EXAMPLES = (
    {"messages": MESSAGES, "max_tokens": 8},
    {"messages": MESSAGES, "max_tokens": 8, "n": 2, "stream": True, "logprobs": True},
)


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    **described(ChatRequest, examples=EXAMPLES, streams=True, more=refusals(409, 412)),
)
async def create_chat_completion(request: Request, context: ContextDep) -> Response:
    """Answer the last of some messages, whole or as a stream of events."""
    order = await read_order(request, context, read_chat, max_quick=NEVER_QUICK)
    return await answer(request, context, order, CHAT)


def read_chat(body: dict[str, Any], context: Context) -> GenerationRequest:
    """Check, render and tokenise. Raises ApiError."""
    request = chat_request(body)
    check_model(request.model, context)
    template = template_of(context)
    params = _params(request, context, template.stop)
    text = render(
        template, request.messages, request.add_generation_prompt, request.chat_template_kwargs
    )
    tokenizer = context.bridge.engine.tokenizer
    ids = read_text(text, tokenizer, is_framed=request.add_special_tokens)
    prompt = cut_prompt(ids, request, context.trained_length)
    order = order_of(request, params, _details(request), [prompt])
    if order.turn is None:
        return order
    return replace(order, continuation=_continuation(request, template, text, tokenizer))


def _continuation(
    request: ChatRequest, template: ChatTemplate, text: str, tokenizer: "Tokenizer"
) -> ChatContinuation:
    """What is read in a session that holds something; `text` is what would begin one.

    Raises ApiError.
    """
    variables = request.chat_template_kwargs | {
        "add_generation_prompt": request.add_generation_prompt
    }
    found = render_after(template, request.messages, variables)
    later, seam = (text.removeprefix(template.opening), "") if found is None else found
    return ChatContinuation(
        tokenizer.encode(_checked(later)), seam, template.ends, request.add_special_tokens
    )


def template_of(context: Context) -> ChatTemplate:
    """The server's template. Raises ApiError where there is none."""
    if context.template is None:
        raise invalid("messages", NO_TEMPLATE)
    return context.template


def render(
    template: ChatTemplate,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    more: dict[str, Any],
) -> str:
    """The prompt of a chat. Raises ApiError."""
    variables = more | {"add_generation_prompt": add_generation_prompt}
    try:
        text = template.render(messages, variables)
    except ChatTemplateError as error:
        raise invalid("messages", str(error)) from None
    if not text:
        raise invalid("messages", "the chat template makes nothing of these messages")
    return _checked(text)


def _checked(text: str) -> str:
    if not is_text(text):
        message = "chat_template_kwargs has a lone surrogate, which is no character"
        raise invalid("chat_template_kwargs", message)
    return text


def _params(request: ChatRequest, context: Context, stop: tuple[str, ...]) -> SamplingParams:
    """Ends where the client says, else after the server's default."""
    name, limit = request.limit
    most = context.max_tokens
    default = min(context.config.default_max_tokens, most)
    if limit is not None and limit > most:
        raise invalid(name, f"{name} must be at most {most}; it is {limit}")
    try:
        return request.engine_params(
            max_tokens=default if limit is None else limit,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            stop=(*request.stop, *stop) if len(request.stop) < MAX_STOP_STRINGS else request.stop,
        )
    except ParameterError as error:
        names = {"max_tokens": name, "logprobs": "top_logprobs"}
        param = names.get(error.param, error.param)
        raise invalid(param, str(error).replace(error.param, param)) from None


def _details(request: ChatRequest) -> OutputOptions:
    return OutputOptions(
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=request.prompt_logprobs,
        token_ids=request.return_token_ids,
        tokens_as_ids=request.return_tokens_as_token_ids,
    )

"""POST /v1/chat/completions."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from cottention.engine.errors import ParameterError
from cottention.engine.sampling_params import MAX_STOP_STRINGS, SamplingParams, shortened
from cottention.server.api.dependencies import Context, ContextDep
from cottention.server.api.generate import check_model, generate, start_of, state_bytes
from cottention.server.api.openapi import error_responses, request_docs
from cottention.server.generation.chat_template import (
    ChatContinuation,
    ChatTemplate,
    ChatTemplateError,
    UnusableTemplate,
    render_after,
)
from cottention.server.generation.choice_format import ChatFormatter
from cottention.server.generation.control_tokens import ControlTokens, Message, RenderedChat
from cottention.server.generation.message_boundaries import message_boundaries
from cottention.server.generation.request import OutputOptions, ParsedRequest, truncate_prompt
from cottention.server.generation.responses import EndpointFormat
from cottention.server.generation.tools.calls import CallFormat
from cottention.server.generation.tools.formats import as_text, instructed
from cottention.server.http.body import is_text
from cottention.server.http.errors import invalid
from cottention.server.schemas.chat import (
    ChatRequest,
    RenderedMessages,
    chat_request,
    unknown_keys,
)
from cottention.server.schemas.responses import ChatCompletion

if TYPE_CHECKING:
    from cottention.engine.text.base import BaseTokenizer

router = APIRouter()

CHAT = EndpointFormat("chatcmpl", "chat.completion", "chat.completion.chunk", ChatFormatter)

DEFAULT_MAX_TOKENS = 1024
"""Where neither the request nor --default-max-tokens nor the model's files limit an answer."""

ALWAYS_IN_THREAD = 0
"""As `max_inline_bytes`: templates are code of the model's author, and never run on the loop."""

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
    **request_docs(
        ChatRequest,
        examples=EXAMPLES,
        streams=True,
        more=error_responses(403, 409, 412),
        is_idempotent=True,
    ),
)
async def create_chat_completion(request: Request, context: ContextDep) -> Response:
    """Answer the last of some messages; the response is whole or a stream of events."""
    return await generate(request, context, parse_chat, CHAT, ALWAYS_IN_THREAD)


def parse_chat(fields: dict[str, Any], context: Context) -> ParsedRequest:
    """Validate a body, render its messages and tokenize the prompt. Raises ApiError."""
    body = chat_request(fields)
    check_model(body.model, context)
    template = template_of(context)
    context.ignored_keys.warn(unknown_keys(fields["messages"]))
    calls = _call_format(body, template)
    params = _params(body, context, template.stop, calls)
    tokenizer, control = context.tokenizer, control_tokens(context, template)
    messages, tools = with_tools(body.messages, template, calls)
    chat = render(template, body, control, messages, tools)
    ids = encode_chat(chat, tokenizer, control, add_special_tokens=body.add_special_tokens)
    prompts = [truncate_prompt(ids, body, context.trained_length)]
    is_plain = not body.is_turn and body.truncate_prompt_tokens is None
    boundaries: tuple[int, ...] = ()
    if is_plain and not body.add_special_tokens:
        boundaries = message_boundaries(chat.text, messages, ids, tokenizer)
    continuation = None
    if body.session_id is not None or body.state is not None:
        continuation = _continuation(body, template, chat, tokenizer, control, tools)
    return ParsedRequest(
        body,
        params,
        _output_options(body, calls, context),
        prompts,
        continuation=continuation,
        boundaries=boundaries,
        start=start_of(body, context),
    )


def _call_format(body: ChatRequest, template: ChatTemplate) -> CallFormat | None:
    """How the answer's calls are written; None if it can have none. Raises ApiError."""
    options = body.calls
    return None if options is None else CallFormat(template.tool_format, options)


def with_tools(
    messages: Sequence[Message], template: ChatTemplate, calls: CallFormat | None
) -> tuple[Sequence[Message], Sequence[Mapping[str, Any]]]:
    """Messages and functions as the template takes them.

    One that knows nothing of functions gets them, calls and results as texts of messages.
    """
    tools = () if calls is None else calls.options.tools
    if template.has_tools:
        return messages, [tool.given for tool in tools]
    texts = as_text(messages)
    return (instructed(texts, tools) if tools else texts), ()


def _continuation(
    body: ChatRequest,
    template: ChatTemplate,
    chat: RenderedChat,
    tokenizer: "BaseTokenizer",
    control: ControlTokens | None,
    tools: Sequence[Mapping[str, Any]],
) -> ChatContinuation:
    """The prompt of a turn after a state that is not empty; `chat` is that after an empty one.

    Raises ApiError.
    """
    messages = body.messages if template.has_tools else as_text(body.messages)
    found = render_after(
        template,
        messages,
        _variables(body),
        control,
        tools,
        continues_last=body.continue_final_message,
    )
    if found is None:
        is_opened = chat.text.startswith(template.opening)
        found = chat.after(len(template.opening) if is_opened else 0), ""
    later, seam = found
    ids = _checked(later).encode(tokenizer, control)
    return ChatContinuation(ids, seam, template.end_texts, body.add_special_tokens)


def template_of(context: Context) -> ChatTemplate:
    """The server's template. Raises ApiError if it has none, or one that cannot be used."""
    if context.template is None:
        raise invalid("messages", NO_TEMPLATE)
    if isinstance(context.template, UnusableTemplate):
        raise invalid("messages", f"this server answers no chats: {context.template.reason}")
    return context.template


def control_tokens(context: Context, template: ChatTemplate) -> ControlTokens | None:
    """The tokens that messages cannot write; None if they may write all."""
    if context.config.allow_special_tokens_in_messages:
        return None
    return ControlTokens.of(context.tokenizer, template.literals)


def _variables(body: RenderedMessages) -> dict[str, Any]:
    """The template's variables; a last message that goes on is followed by no other."""
    begins_answer = body.add_generation_prompt and not body.continue_final_message
    return body.chat_template_kwargs | {"add_generation_prompt": begins_answer}


def render(
    template: ChatTemplate,
    body: RenderedMessages,
    control: ControlTokens | None,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
) -> RenderedChat:
    """The text of a chat's prompt: `messages` are its own as the template takes them.

    Raises ApiError.
    """
    variables = _variables(body)
    try:
        chat = template.track(messages, variables, control, tools)
        if body.continue_final_message:
            chat = template.up_to_last_content(chat, messages, variables)
    except ChatTemplateError as error:
        raise invalid("messages", str(error)) from None
    if not chat.text:
        raise invalid("messages", "the chat template renders these messages as an empty prompt")
    return _checked(chat)


def encode_chat(
    chat: RenderedChat,
    tokenizer: "BaseTokenizer",
    control: ControlTokens | None,
    *,
    add_special_tokens: bool,
) -> list[int]:
    """Token ids of a chat's prompt, with or without the special tokens that its tokenizer adds."""
    ids = chat.encode(tokenizer, control)
    return tokenizer.framed(ids) if add_special_tokens else ids


def _checked(chat: RenderedChat) -> RenderedChat:
    if not is_text(chat.text):
        message = "chat_template_kwargs has a lone surrogate, which is not a character"
        raise invalid("chat_template_kwargs", message)
    return chat


def _params(
    body: ChatRequest, context: Context, stop: tuple[str, ...], calls: CallFormat | None
) -> SamplingParams:
    """The engine's parameters; without a limit of the client that of the server or model holds."""
    name, limit = body.limit
    most = context.max_tokens
    own = context.default_sampling_params
    default = context.config.default_max_tokens or own.get("max_tokens", DEFAULT_MAX_TOKENS)
    if limit is not None and limit > most:
        message = f"{name} must be at least 1 and at most {most}; it is {shortened(limit)}"
        raise invalid(name, message)
    more: dict[str, Any] = {}
    if calls is not None:
        # The texts of a format may be special tokens, by which calls are read.
        structured = calls.format.structure(calls.options)
        more = {"structured": structured, "skip_special_tokens": False}
    try:
        return body.engine_params(
            own,
            **more,
            max_tokens=min(default, most) if limit is None else limit,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            stop=(*body.stop, *stop) if len(body.stop) < MAX_STOP_STRINGS else body.stop,
        )
    except ParameterError as error:
        names = {"max_tokens": name, "logprobs": "top_logprobs"}
        param = names.get(error.param, error.param)
        message = str(error).replace(error.param, param).replace("(max_tokens)", f"({name})")
        raise invalid(param, message) from None


def _output_options(body: ChatRequest, calls: CallFormat | None, context: Context) -> OutputOptions:
    return OutputOptions(
        calls=calls,
        has_prompt_once=True,
        logprobs=body.num_alternatives((body.top_logprobs or 0) if body.logprobs else None),
        prompt_logprobs=body.prompt_logprobs,
        token_ids=body.return_token_ids,
        state_bytes=state_bytes(body, context),
        tokens_as_ids=body.return_tokens_as_token_ids,
    )

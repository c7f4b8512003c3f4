"""The body of POST /v1/chat/completions."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, PlainValidator

from cottention.server.http.body import shown
from cottention.server.http.errors import invalid
from cottention.server.schemas.base import RequestModel, validate
from cottention.server.schemas.field_types import check_text, field_error, wrong_type
from cottention.server.schemas.sampling import BOOLEAN, SamplingBody, ranged
from cottention.server.schemas.sessions import check_turn
from cottention.server.schemas.tools import (
    TOOL_CHOICE,
    TOOLS,
    CallOptions,
    ToolChoice,
    Tools,
    call_options,
    message_calls,
)
from cottention.server.schemas.unsupported import CHAT, NeutralValues, is_neutral

TEXT_NAMES = ("role", "content", "name", "tool_call_id")

NEUTRAL_IN_MESSAGES: NeutralValues = {
    "audio": (),
    "function_call": (),
}
"""Fields of a message that are refused, except values without effect; null counts as absent."""

KNOWN_KEYS = {
    *TEXT_NAMES,
    *NEUTRAL_IN_MESSAGES,
    "annotations",
    "cache_control",
    "refusal",
    "tool_calls",
}
"""Keys of a message that are not logged as unknown; some are ignored."""

TEXT_PARTS: Mapping[str, str] = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
"""Types of a content's parts that are text, and the key that has it."""

KNOWN_PART_KEYS = {"type", "annotations", "cache_control"}

UNUSED_TOOLS: Mapping[str, str] = {"function_call": "functions"}
"""Where the first is "none", the second is not used."""


class TextPart(BaseModel):
    """A text part of a message's content."""

    type: Literal["text"]
    text: str


class CalledFunction(BaseModel):
    """A function that was called, and its arguments as JSON."""

    name: str
    arguments: str


class MessageCall(BaseModel):
    """A call in an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    """A message of a chat."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[MessageCall] | None = None
    tool_call_id: str | None = None


def _messages(value: Any) -> list[dict[str, Any]]:
    """Messages with text contents; several parts are joined with newlines. Calls are parsed."""
    if not isinstance(value, list):
        raise wrong_type()
    if not value:
        raise field_error("messages must not be empty")
    return [_message(each, f"messages[{place}]") for place, each in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, Any]:
    """A message's text fields and calls. An assistant's content may be absent: it is empty."""
    if not isinstance(value, dict):
        raise field_error(f"{where} must be an object; it is {shown(value)}")
    given = _given(value)
    for name in given.keys() & NEUTRAL_IN_MESSAGES.keys():
        if not is_neutral(NEUTRAL_IN_MESSAGES[name], given[name]):
            raise field_error(f"{where}.{name} is not supported yet: leave it out")
    default = "" if given.get("role") == "assistant" else None
    found = {"role": given.get("role"), "content": _content(given.get("content", default), where)}
    found |= {name: given[name] for name in ("name", "tool_call_id") if name in given}
    for name, text in found.items():
        if text is None:
            raise field_error(f"{where}.{name} is required; it must be a string")
        if not isinstance(text, str):
            raise field_error(f"{where}.{name} must be a string; it is {shown(text)}")
        check_text(f"{where}.{name}", text)
    if calls := message_calls(given.get("tool_calls", []), f"{where}.tool_calls"):
        found["tool_calls"] = calls
    return found


def _content(value: Any, where: str) -> Any:
    if not isinstance(value, list):
        return value
    return "\n".join(_part(part, f"{where}.content[{place}]") for place, part in enumerate(value))


def _part(value: Any, where: str) -> str:
    """The text of a content's part."""
    if not isinstance(value, dict):
        raise field_error(f'{where} must be {{"type": "text", "text": ...}}; it is {shown(value)}')
    given = _given(value)
    kind = given.get("type")
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        is_kind = f"it is {shown(kind)}" if "type" in given else "it is absent"
        raise field_error(
            f'{where}.type must be "text", since this model takes text only; {is_kind}'
        )
    name = TEXT_PARTS[kind]
    if name not in given:
        raise field_error(f"{where}.{name} is required; it must be a string")
    text = given[name]
    if not isinstance(text, str):
        raise field_error(f"{where}.{name} must be a string; it is {shown(text)}")
    return text


def _given(value: dict[str, Any]) -> dict[str, Any]:
    """An object's keys with values; null counts as absent."""
    return {name: each for name, each in value.items() if each is not None}


def unknown_keys(messages: list[dict[str, Any]]) -> Iterator[str]:
    """Keys of valid messages, and of parts of their contents, that are ignored as unknown."""
    for message in messages:
        yield from _given(message).keys() - KNOWN_KEYS
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            yield from _given(part).keys() - KNOWN_PART_KEYS - {TEXT_PARTS[part["type"]]}


Messages = Annotated[
    list[dict[str, Any]], PlainValidator(_messages, json_schema_input_type=list[ChatMessage])
]

MESSAGES = "a list of objects with role and content"


class RenderedMessages(RequestModel):
    """What a chat template is given."""

    messages: Messages = Field(description=MESSAGES)
    add_generation_prompt: bool = Field(True, description=BOOLEAN)
    continue_final_message: bool = Field(False, description=BOOLEAN)
    chat_template_kwargs: dict[str, Any] = Field({}, description="an object")


class ChatRequest(RenderedMessages, SamplingBody):
    """Body of POST /v1/chat/completions."""

    neutral: ClassVar[NeutralValues] = CHAT

    max_tokens: int | None = ranged(None, "a whole number from 1", 1)
    max_completion_tokens: int | None = ranged(None, "a whole number from 1", 1)
    logprobs: bool = Field(False, description=BOOLEAN)
    top_logprobs: int | None = ranged(None, "a whole number from 0 to 20", 0, 20)
    add_special_tokens: bool = Field(False, description=BOOLEAN)
    tools: Tools = Field((), description=f"a list of {TOOLS}")
    tool_choice: ToolChoice | None = Field(None, description=TOOL_CHOICE)
    parallel_tool_calls: bool = Field(True, description=BOOLEAN)

    @property
    def calls(self) -> CallOptions | None:
        """Which tools the answer may call, and whether it must; None: it is text.

        Raises ApiError.
        """
        options = call_options(self.tools, self.tool_choice, self.parallel_tool_calls)
        if options is not None and self.structured is not None:
            name = self.structured.param
            message = f'{name} is not possible with tools, unless tool_choice is "none"'
            raise invalid(name, message)
        return options

    @property
    def limit(self) -> tuple[str, int | None]:
        """The name and value of the field that limits the response."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens


def check_generation_prompt(request: RenderedMessages) -> None:
    """Raise ApiError 400 where the answer is to be both a new message and a part of the last."""
    is_asked = "add_generation_prompt" in request.model_fields_set
    if request.continue_final_message and is_asked and request.add_generation_prompt:
        message = "add_generation_prompt must be false or absent with continue_final_message"
        raise invalid("add_generation_prompt", message)


def chat_request(body: Mapping[str, Any]) -> ChatRequest:
    """Validate a body. Raises ApiError 400 naming the field."""
    unused = {tools for choice, tools in UNUSED_TOOLS.items() if body.get(choice) == "none"}
    is_used = {name: name not in unused or not isinstance(body[name], list) for name in body}
    request = validate(ChatRequest, {name: body[name] for name in body if is_used[name]})
    check_generation_prompt(request)
    request.check_together(request.n, "n")
    check_turn(request, num_prompts=1)
    both = (request.max_tokens, request.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        values = " and ".join(map(shown, both))
        message = f"max_tokens and max_completion_tokens differ ({values}): give one of them"
        raise invalid("max_tokens", message)
    name, limit = request.limit
    if limit is not None and limit < 1:  # 0 is valid for completions, to score a prompt
        raise invalid(name, f"{name} must be a whole number from 1; it is {shown(limit)}")
    if request.top_logprobs is not None and not request.logprobs:
        message = "top_logprobs is only allowed if logprobs is true: leave it out"
        raise invalid("top_logprobs", message)
    return request

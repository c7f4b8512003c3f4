"""The body of POST /v1/chat/completions."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, PlainValidator

from cottention.server.http.body import shown
from cottention.server.http.errors import invalid
from cottention.server.schemas.base import validate
from cottention.server.schemas.field_types import check_text, field_error, wrong_type
from cottention.server.schemas.sampling import BOOLEAN, SamplingBody, ranged
from cottention.server.schemas.sessions import check_turn
from cottention.server.schemas.unsupported import CHAT, NeutralValues, is_neutral

TEXT_NAMES = ("role", "content", "name")

NEUTRAL_IN_MESSAGES: NeutralValues = {
    "refusal": (None,),
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "tool_calls": (None, []),
    "tool_call_id": (None,),
    "reasoning": (None,),
    "reasoning_content": (None,),
}
"""Fields of an assistant's message that clients send back, with values without effect."""


class TextPart(BaseModel):
    """A text part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of a chat."""

    role: str
    content: str | list[TextPart]
    name: str | None = None


def _messages(value: Any) -> list[dict[str, str]]:
    """Messages with text contents; several parts are joined with newlines."""
    if not isinstance(value, list):
        raise wrong_type()
    if not value:
        raise field_error("messages must not be empty")
    return [_message(each, f"messages[{place}]") for place, each in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise field_error(f"{where} must be an object; it is {shown(value)}")
    for name in value.keys() - set(TEXT_NAMES):
        if name not in NEUTRAL_IN_MESSAGES:
            raise field_error(f"{where} has no field {shown(name)}")
        if not is_neutral(NEUTRAL_IN_MESSAGES[name], value[name]):
            raise field_error(f"{where}.{name} is not supported yet: leave it out")
    found = {"role": value.get("role"), "content": _content(value.get("content"), where)}
    if value.get("name") is not None:
        found["name"] = value["name"]
    for name, text in found.items():
        if text is None:
            raise field_error(f"{where}.{name} is required; it must be a string")
        if not isinstance(text, str):
            raise field_error(f"{where}.{name} must be a string; it is {shown(text)}")
        check_text(f"{where}.{name}", text)
    return found


def _content(value: Any, where: str) -> Any:
    if not isinstance(value, list):
        return value
    for place, part in enumerate(value):
        if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
            raise field_error(f'{where}.content[{place}] must be {{"type": "text", "text": ...}}')
        if not isinstance(part["text"], str):
            raise field_error(f"{where}.content[{place}].text must be a string")
    return "\n".join(part["text"] for part in value)


Messages = Annotated[
    list[dict[str, str]], PlainValidator(_messages, json_schema_input_type=list[ChatMessage])
]

MESSAGES = "a list of objects with role and content"


class ChatRequest(SamplingBody):
    """Body of POST /v1/chat/completions."""

    neutral: ClassVar[NeutralValues] = CHAT

    messages: Messages = Field(description=MESSAGES)
    max_tokens: int | None = ranged(None, "a whole number from 1", 1)
    max_completion_tokens: int | None = ranged(None, "a whole number from 1", 1)
    logprobs: bool = Field(False, description=BOOLEAN)
    top_logprobs: int | None = ranged(None, "a whole number from 0 to 20", 0, 20)
    add_generation_prompt: bool = Field(True, description=BOOLEAN)
    add_special_tokens: bool = Field(False, description=BOOLEAN)
    chat_template_kwargs: dict[str, Any] = Field({}, description="an object")

    @property
    def limit(self) -> tuple[str, int | None]:
        """The name and value of the field that limits the response."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens


def chat_request(body: Mapping[str, Any]) -> ChatRequest:
    """Validate a body. Raises ApiError 400 naming the field."""
    request = validate(ChatRequest, body)
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

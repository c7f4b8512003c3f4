"""Bodies of POST /v1/messages and /v1/messages/count_tokens, Anthropic's, as chats."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, PlainValidator

from cottention.server.http.body import shown
from cottention.server.http.errors import invalid
from cottention.server.schemas.base import RequestModel
from cottention.server.schemas.field_types import (
    ListedStrings,
    ShortText,
    check_text,
    field_error,
    wrong_type,
)
from cottention.server.schemas.sampling import BOOLEAN, MODEL, ranged
from cottention.server.schemas.unsupported import ANY, NeutralValues

PATH = "/v1/messages"

ChatMessages = tuple[dict[str, Any], ...]

MESSAGES = "a list of messages with the roles user and assistant, of text, tool_use and tool_result"
SYSTEM = "a text or a list of text blocks"
TOOLS = 'a list of {"name": ..., "input_schema": {...}}; other tools are not supported'
TOOL_CHOICE = '{"type": "auto"}, {"type": "any"}, {"type": "none"} or {"type": "tool", "name": ...}'
FORMAT = '{"type": "json_schema", "schema": {...}}'

IGNORED_IN_BLOCKS = {"cache_control", "citations", "is_error", "caller"}


class MessagesErrorDetail(BaseModel):
    """What was wrong."""

    type: str
    message: str


class MessagesErrorBody(BaseModel):
    """An error in Anthropic's form."""

    type: Literal["error"]
    error: MessagesErrorDetail
    request_id: str | None


class TextBlock(BaseModel):
    """A text."""

    type: Literal["text"]
    text: str


class ToolUseBlock(BaseModel):
    """A call in an assistant's message."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(BaseModel):
    """What a tool that was called has returned."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None


class MessageParam(BaseModel):
    """A message."""

    role: Literal["user", "assistant"]
    content: str | list[TextBlock | ToolUseBlock | ToolResultBlock]


class ToolParam(BaseModel):
    """A function that the answer may call."""

    name: Annotated[str, Field(pattern="^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None


class ToolChoiceParam(BaseModel):
    """Whether tools have to be called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(BaseModel):
    """The schema that the answer follows."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise field_error(f"{where} must be an object; it is {shown(value)}")
    return {name: each for name, each in value.items() if each is not None}


def _text(given: dict[str, Any], name: str, where: str) -> str:
    text = given.get(name)
    if not isinstance(text, str):
        raise field_error(f"{where}.{name} must be a string; it is {shown(text)}")
    check_text(f"{where}.{name}", text)
    return text


def _joined(value: Any, where: str) -> str:
    """The text of a text, or of text blocks."""
    if isinstance(value, str):
        check_text(where, value)
        return value
    if not isinstance(value, list):
        raise field_error(f"{where} must be {SYSTEM}; it is {shown(value)}")
    texts = []
    for place, each in enumerate(value):
        block = _object(each, f"{where}[{place}]")
        if block.get("type") != "text":
            allowed = f'{where}[{place}].type must be "text", since this model takes text only'
            raise field_error(f"{allowed}; it is {shown(block.get('type'))}")
        texts.append(_text(block, "text", f"{where}[{place}]"))
    return "\n".join(texts)


def _messages(value: Any) -> ChatMessages:
    """Messages of a chat."""
    if not isinstance(value, list):
        raise wrong_type()
    if not value:
        raise field_error("messages must not be empty")
    found: list[dict[str, Any]] = []
    for place, each in enumerate(value):
        found += _message(_object(each, f"messages[{place}]"), f"messages[{place}]")
    return tuple(found)


def _message(given: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """A message of a chat; results of tools are messages of their own before it."""
    role, content = given.get("role"), given.get("content")
    if role not in ("user", "assistant"):
        raise field_error(f"{where}.role must be user or assistant; it is {shown(role)}")
    if not isinstance(content, list):
        return [{"role": role, "content": _joined(content, f"{where}.content")}]
    results, calls, texts = [], [], []
    for place, each in enumerate(content):
        at = f"{where}.content[{place}]"
        block = _object(each, at)
        match block.get("type"), role:
            case "text", _:
                texts.append(_text(block, "text", at))
            case "tool_use", "assistant":
                calls.append(_call(block, at))
            case "tool_result", "user":
                text = _joined(block.get("content", ""), f"{at}.content")
                call_id = _text(block, "tool_use_id", at)
                results.append({"role": "tool", "tool_call_id": call_id, "content": text})
            case kind, _:
                allowed = "text, tool_use of an assistant or tool_result of a user"
                raise field_error(f"{at}.type must be {allowed}; {shown(kind)} is not supported")
    message: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
    if calls:
        message["tool_calls"] = calls
    return results + ([message] if texts or calls or not results else [])


def _call(block: dict[str, Any], where: str) -> dict[str, Any]:
    arguments = block.get("input", {})
    if not isinstance(arguments, dict):
        raise field_error(f"{where}.input must be an object; it is {shown(arguments)}")
    function = {"name": _text(block, "name", where), "arguments": json.dumps(arguments)}
    return {"id": _text(block, "id", where), "type": "function", "function": function}


def _system(value: Any) -> str:
    return _joined(value, "system")


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Tools of a chat, where their fields are checked."""
    if not isinstance(value, list):
        raise wrong_type()
    found = []
    for place, each in enumerate(value):
        given = _object(each, f"tools[{place}]")
        kind = given.get("type", "custom")
        if kind != "custom":
            raise field_error(f"tools[{place}]: tools of the type {shown(kind)} are not supported")
        function = {name: given[name] for name in ("name", "description") if name in given}
        schema = {"parameters": given.get("input_schema")}
        found.append({"type": "function", "function": function | schema})
    return tuple(found)


def _tool_choice(value: Any) -> dict[str, Any]:
    given = _object(value, "tool_choice")
    if given.get("type") not in ("auto", "any", "tool", "none"):
        raise field_error(f"tool_choice must be {TOOL_CHOICE}; it is {shown(value)}")
    if not isinstance(given.get("disable_parallel_tool_use", False), bool):
        raise field_error("tool_choice.disable_parallel_tool_use must be true or false")
    return given


def _format(value: Any) -> dict[str, Any]:
    given = _object(value, "output_config.format")
    if given.get("type") != "json_schema" or not isinstance(given.get("schema"), dict):
        raise field_error(f"output_config.format must be {FORMAT}; it is {shown(value)}")
    return {"type": "json_schema", "json_schema": {"name": "format", "schema": given["schema"]}}


class OutputConfig(RequestModel):
    """What the text has to be."""

    format: (
        Annotated[dict[str, Any], PlainValidator(_format, json_schema_input_type=OutputFormat)]
        | None
    ) = Field(None, description=FORMAT)


NEUTRAL: NeutralValues = {
    "cache_control": (ANY,),  # prefixes are kept by themselves
    "container": (),
    "context_management": ({},),
    "diagnostics": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "metadata": (ANY,),
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
    "thinking": ({"type": "disabled"},),
    "user_profile_id": (ANY,),
    "workspace_id": (ANY,),
}


class CountTokensRequest(RequestModel):
    """Body of POST /v1/messages/count_tokens."""

    neutral: ClassVar[NeutralValues] = NEUTRAL
    nested: ClassVar[Mapping[str, type[RequestModel]]] = {"output_config": OutputConfig}

    messages: Annotated[
        ChatMessages,
        PlainValidator(
            _messages,
            json_schema_input_type=Annotated[list[MessageParam], Field(min_length=1)],
        ),
    ] = Field(description=MESSAGES)
    model: ShortText | None = Field(None, description=MODEL)
    system: (
        Annotated[str, PlainValidator(_system, json_schema_input_type=str | list[TextBlock])] | None
    ) = Field(None, description=SYSTEM)
    tools: Annotated[
        tuple[dict[str, Any], ...], PlainValidator(_tools, json_schema_input_type=list[ToolParam])
    ] = Field((), description=TOOLS)
    tool_choice: (
        Annotated[
            dict[str, Any], PlainValidator(_tool_choice, json_schema_input_type=ToolChoiceParam)
        ]
        | None
    ) = Field(None, description=TOOL_CHOICE)
    output_config: OutputConfig | None = Field(None, description="an object")

    def as_chat(self) -> dict[str, Any]:
        """The fields of a chat request that asks for the same. Raises ApiError."""
        messages = [*self.messages]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        fields: dict[str, Any] = {"messages": messages, "model": self.model}
        last = messages[-1]
        if last["role"] == "assistant" and "tool_calls" not in last:  # the answer goes on with it
            fields |= {"continue_final_message": True, "add_generation_prompt": False}
        if self.output_config is not None:
            fields["response_format"] = self.output_config.format
        return fields | {"tools": list(self.tools)} | self._choice()

    def _choice(self) -> dict[str, Any]:
        choice = self.tool_choice
        if choice is None:
            return {}
        name = choice.get("name")
        if choice["type"] == "tool" and not isinstance(name, str):
            raise invalid("tool_choice", f"tool_choice.name must be a string; it is {shown(name)}")
        named = {"type": "function", "function": {"name": name}}
        ways: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none", "tool": named}
        is_parallel = not choice.get("disable_parallel_tool_use", False)
        return {"tool_choice": ways[choice["type"]], "parallel_tool_calls": is_parallel}


class MessagesRequest(CountTokensRequest):
    """Body of POST /v1/messages."""

    max_tokens: int = ranged(..., "a whole number from 1", 1)
    stream: bool = Field(False, description=BOOLEAN)
    stop_sequences: ListedStrings = Field((), description="a list of up to 16 strings")
    temperature: float | None = ranged(None, "a finite number from 0", 0)
    top_p: float | None = ranged(None, "a number greater than 0 and at most 1", 0, 1)
    top_k: int | None = ranged(None, "a whole number from 1, or 0 or -1 for all", -1, 2**31 - 1)

    def as_chat(self) -> dict[str, Any]:
        """The fields of a chat request that asks for the same. Raises ApiError."""
        names = ("max_tokens", "stream", "temperature", "top_p", "top_k")
        more = {name: getattr(self, name) for name in names}
        return super().as_chat() | more | {"stop": list(self.stop_sequences)}


CHAT_NAMES: Mapping[str, str] = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
}
"""Fields of chats, and what they are called in a body of this API."""

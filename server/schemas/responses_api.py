"""The body of POST /v1/responses, and its items as the messages of a chat."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, PlainValidator

from cottention.engine.state.context_window import ContextPolicy
from cottention.server.http.body import shown
from cottention.server.schemas.base import RequestModel
from cottention.server.schemas.field_types import (
    MAX_SHORT,
    Name,
    ShortText,
    Text,
    check_text,
    field_error,
    wrong_type,
)
from cottention.server.schemas.sampling import BOOLEAN, MODEL, POLICY, PRIORITY, TIMEOUT, ranged
from cottention.server.schemas.sessions import METADATA, Metadata
from cottention.server.schemas.unsupported import ANY, NeutralValues

Item = dict[str, Any]
"""An item of an input or an output, in the API's shape."""

ROLES = ("user", "assistant", "system", "developer")
TEXT_PARTS = {"input_text": "text", "output_text": "text", "refusal": "refusal"}
LOGPROBS = "message.output_text.logprobs"

INPUT = (
    "a text, or a list of messages, function_call and function_call_output items; other items are"
    " not supported"
)
INCLUDE = f'a list that may have "{LOGPROBS}"'
FORMAT = (
    '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "name": ..., "schema":'
    " {...}}"
)
TOOLS = 'a list of {"type": "function", "name": ..., "parameters": {...}}; others are not supported'
TOOL_CHOICE = '"none", "auto", "required" or {"type": "function", "name": ...}'
PREVIOUS = f"a string of up to {MAX_SHORT} characters, the id of a stored response"
TRUNCATION = '"auto" or "disabled"'

MAX_ITEMS = 4096


class InputText(BaseModel):
    """A text part of a message's content."""

    type: Literal["input_text", "output_text"]
    text: str


class InputMessage(BaseModel):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText]


class FunctionCall(BaseModel):
    """A call of a function in an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionCallOutput(BaseModel):
    """What a function that was called has returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]


class FunctionTool(BaseModel):
    """A function that the answer may call. Arguments always follow the schema."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern="^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(BaseModel):
    """The function that has to be called."""

    type: Literal["function"]
    name: str


class TextFormat(BaseModel):
    """What the text has to be. Answers always follow a schema, whatever `strict` says."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


def _input(value: Any) -> tuple[Item, ...]:
    """The items of an input, in the API's shape with all their fields."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise wrong_type()
    if not 1 <= len(value) <= MAX_ITEMS:
        raise field_error(f"input must have 1 to {MAX_ITEMS} items; it has {len(value)}")
    return tuple(_item(each, f"input[{place}]") for place, each in enumerate(value))


def _item(value: Any, where: str) -> Item:
    given = _object(value, where)
    kind = given.get("type", "message")
    if kind == "message":
        return _message(given, where)
    if kind == "function_call":
        texts = {name: _text(given, name, where) for name in ("call_id", "name", "arguments")}
        return {"type": kind, **texts, "status": "completed"}
    if kind == "function_call_output":
        output = _content(given.get("output"), f"{where}.output")
        return {
            "type": kind,
            "call_id": _text(given, "call_id", where),
            "output": "\n".join(part["text"] for part in output),
            "status": "completed",
        }
    allowed = '"message", "function_call" or "function_call_output"'
    raise field_error(f"{where}.type must be {allowed}; {shown(kind)} is not supported")


def _message(given: Item, where: str) -> Item:
    role = given.get("role")
    if role not in ROLES:
        raise field_error(f"{where}.role must be one of {', '.join(ROLES)}; it is {shown(role)}")
    content = _content(given.get("content"), f"{where}.content")
    kind = "output_text" if role == "assistant" else "input_text"
    parts = [{"type": kind, **part} for part in content]
    return {"type": "message", "role": role, "content": parts, "status": "completed"}


def _content(value: Any, where: str) -> list[dict[str, str]]:
    """The texts of a content."""
    if isinstance(value, str):
        check_text(where, value)
        return [{"text": value}]
    if not isinstance(value, list):
        raise field_error(f"{where} must be a text or a list of text parts; it is {shown(value)}")
    return [_part(each, f"{where}[{place}]") for place, each in enumerate(value)]


def _part(value: Any, where: str) -> dict[str, str]:
    given = _object(value, where)
    kind = given.get("type")
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        raise field_error(
            f'{where}.type must be "input_text" or "output_text", since this model takes text'
            f" only; it is {shown(kind)}"
        )
    return {"text": _text(given, TEXT_PARTS[kind], where)}


def _object(value: Any, where: str) -> Item:
    if not isinstance(value, dict):
        raise field_error(f"{where} must be an object; it is {shown(value)}")
    return {name: each for name, each in value.items() if each is not None}


def _text(given: Item, name: str, where: str) -> str:
    text = given.get(name)
    if not isinstance(text, str):
        raise field_error(f"{where}.{name} must be a string; it is {shown(text)}")
    check_text(f"{where}.{name}", text)
    return text


def _include(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise wrong_type()
    for each in value:
        if each != LOGPROBS:
            raise field_error(f"include must be {INCLUDE}; {shown(each)} is not supported")
    return tuple(value)


def _tools(value: Any) -> tuple[Item, ...]:
    """Tools in the shape of chats; their fields are checked there."""
    if not isinstance(value, list):
        raise wrong_type()
    found = []
    for place, each in enumerate(value):
        given = _object(each, f"tools[{place}]")
        kind = given.pop("type", None)
        if kind != "function":
            allowed = f'tools[{place}].type must be "function"'
            raise field_error(f"{allowed}; {shown(kind)} is not supported")
        found.append({"type": "function", "function": given})
    return tuple(found)


def _tool_choice(value: Any) -> Any:
    """In the shape of chats."""
    if value in ("none", "auto", "required"):
        return value
    if isinstance(value, dict) and value.get("type") == "function":
        return {"type": "function", "function": {"name": value.get("name")}}
    raise field_error(f"tool_choice must be {TOOL_CHOICE}; it is {shown(value)}")


def _format(value: Any) -> Item:
    """A response_format of chats."""
    given = _object(value, "text.format")
    kind = given.pop("type", None)
    if kind == "json_schema":
        return {"type": kind, "json_schema": given}
    if kind not in ("text", "json_object") or given:
        raise field_error(f"text.format must be {FORMAT}; it is {shown(value)}")
    return {"type": kind}


Items = Annotated[
    tuple[Item, ...],
    PlainValidator(
        _input,
        json_schema_input_type=str
        | Annotated[
            list[InputMessage | FunctionCall | FunctionCallOutput],
            Field(min_length=1, max_length=MAX_ITEMS),
        ],
    ),
]


class TextOptions(RequestModel):
    """What the text has to be."""

    neutral: ClassVar[NeutralValues] = {"verbosity": ("medium",)}

    format: Annotated[Item, PlainValidator(_format, json_schema_input_type=TextFormat)] | None = (
        Field(None, description=FORMAT)
    )


RESPONSES: NeutralValues = {
    "context_management": ([],),
    "conversation": (),
    "max_tool_calls": (),
    "moderation": (),
    "prompt": (),
    "prompt_cache_key": (ANY,),
    "prompt_cache_options": (),
    "prompt_cache_retention": (ANY,),
    "reasoning": ({}, {"effort": "none"}),
    "safety_identifier": (ANY,),
    "service_tier": ("auto", "default"),
    "stream_options": ({}, {"include_obfuscation": False}),
    "user": (ANY,),
}


class ResponseRequest(RequestModel):
    """Body of POST /v1/responses."""

    neutral: ClassVar[NeutralValues] = RESPONSES
    nested: ClassVar[Mapping[str, type[RequestModel]]] = {"text": TextOptions}

    input: Items = Field(description=INPUT)
    model: ShortText | None = Field(None, description=MODEL)
    instructions: Text | None = Field(None, description="a text")
    previous_response_id: ShortText | None = Field(None, description=PREVIOUS)
    store: bool | None = Field(None, description=BOOLEAN)
    background: bool = Field(False, description=BOOLEAN)
    stream: bool = Field(False, description=BOOLEAN)
    include: Annotated[
        tuple[str, ...],
        PlainValidator(
            _include, json_schema_input_type=list[Literal["message.output_text.logprobs"]]
        ),
    ] = Field((), description=INCLUDE)
    max_output_tokens: int | None = ranged(None, "a whole number from 1", 1)
    metadata: Metadata = Field({}, description=METADATA)
    parallel_tool_calls: bool = Field(True, description=BOOLEAN)
    temperature: float | None = ranged(None, "a finite number from 0", 0)
    top_p: float | None = ranged(None, "a number greater than 0 and at most 1", 0, 1)
    top_logprobs: int | None = ranged(None, "a whole number from 0 to 20", 0, 20)
    text: TextOptions | None = Field(None, description="an object")
    tool_choice: (
        Annotated[
            Any,
            PlainValidator(
                _tool_choice,
                json_schema_input_type=Literal["none", "auto", "required"] | NamedFunction,
            ),
        ]
        | None
    ) = Field(None, description=TOOL_CHOICE)
    tools: Annotated[
        tuple[Item, ...], PlainValidator(_tools, json_schema_input_type=list[FunctionTool])
    ] = Field((), description=TOOLS)
    truncation: Literal["auto", "disabled"] = Field("disabled", description=TRUNCATION)
    seed: int | None = ranged(None, "a whole number of 64 bits", -(2**63), 2**63 - 1)
    top_k: int | None = ranged(None, "a whole number from 1, or 0 or -1 for all", -1, 2**31 - 1)
    min_p: float | None = ranged(None, "a number from 0 to 1", 0, 1)
    context_policy: ContextPolicy | None = Field(None, description=POLICY)
    priority: int | None = ranged(None, PRIORITY, -(2**63) + 1, 2**63 - 1)
    timeout: float | None = ranged(None, TIMEOUT, 0)
    request_id: Name | None = Field(None, description="up to 128 letters, digits, ., _, : and -")

    @property
    def has_logprobs(self) -> bool:
        """Whether the answer has log-probabilities."""
        return LOGPROBS in self.include

    def as_chat(self) -> dict[str, Any]:
        """The fields of a chat request that asks for the same, without a session."""
        fields: dict[str, Any] = {
            "messages": messages_of(self.input, self.instructions),
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": self.has_logprobs,
            "top_logprobs": self.top_logprobs if self.has_logprobs else None,
            "tools": list(self.tools),
            "tool_choice": self.tool_choice,
            "response_format": None if self.text is None else self.text.format,
        }
        same = ("model", "stream", "temperature", "top_p", "parallel_tool_calls", "seed", "top_k")
        more = ("min_p", "context_policy", "priority", "timeout", "request_id")
        return fields | {name: getattr(self, name) for name in (*same, *more)}


CHAT_NAMES: Mapping[str, str] = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "logprobs": "include",
}
"""Fields of chats, and what they are called in a body of this API."""


def messages_of(items: tuple[Item, ...], instructions: str | None) -> list[dict[str, Any]]:
    """Items as messages of a chat. Calls belong to the assistant's message before them."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        match item["type"]:
            case "message":
                role = "system" if item["role"] == "developer" else item["role"]
                text = "\n".join(part["text"] for part in item["content"])
                messages.append({"role": role, "content": text})
            case "function_call":
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                function = {"name": item["name"], "arguments": item["arguments"]}
                call = {"id": item["call_id"], "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
            case _:
                found = {"role": "tool", "tool_call_id": item["call_id"]}
                messages.append(found | {"content": item["output"]})
    return messages

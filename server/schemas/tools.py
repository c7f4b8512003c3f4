"""Tools of a chat: functions that a model may call, which of them it must, and earlier calls."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator

from cottention.server.http.body import shown
from cottention.server.http.errors import invalid
from cottention.server.schemas.field_types import check_text, field_error
from cottention.server.schemas.structured import schema_text

MAX_TOOLS = 128
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
NO_PARAMETERS = {"type": "object", "properties": {}}

TOOLS = '{"type": "function", "function": {"name": ..., "parameters": {...}}}'
TOOL_CHOICE = '"none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
CALL = '{"id": ..., "type": "function", "function": {"name": ..., "arguments": "{...}"}}'


@dataclass(frozen=True, slots=True)
class Tool:
    """A function. schema: of its arguments, as JSON. given: as the client describes it."""

    name: str
    schema: str
    given: dict[str, Any]


class ToolFunction(BaseModel):
    """What a function is called, and what its arguments are. They always follow the schema."""

    name: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolObject(BaseModel):
    """A tool; it is a function."""

    type: Literal["function"]
    function: ToolFunction


class FunctionName(BaseModel):
    """The name of one of the tools."""

    name: str


class NamedTool(BaseModel):
    """The tool that has to be called."""

    type: Literal["function"]
    function: FunctionName


def _tools(value: Any) -> tuple[Tool, ...]:
    if not isinstance(value, list):
        raise field_error(f"tools must be a list of {TOOLS}; it is {shown(value)}")
    if len(value) > MAX_TOOLS:
        raise field_error(f"tools must have at most {MAX_TOOLS}; it has {len(value)}")
    tools = [_tool(each, f"tools[{place}]") for place, each in enumerate(value)]
    names = [tool.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise field_error(f"tools has {shown(name)} twice: names must differ")
    return tuple(tools)


def _tool(value: Any, where: str) -> Tool:
    given = value if isinstance(value, dict) else {}
    function = given.get("function")
    if given.get("type") != "function" or not isinstance(function, dict):
        raise field_error(f"{where} must be {TOOLS}; it is {shown(value)}")
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        allowed = "1 to 64 letters, digits, _, . and -"
        raise field_error(f"{where}.function.name must be {allowed}; it is {shown(name)}")
    description = function.get("description")
    if description is not None:
        if not isinstance(description, str):
            found = f"it is {shown(description)}"
            raise field_error(f"{where}.function.description must be a string; {found}")
        check_text(f"{where}.function.description", description)
    parameters = function.get("parameters") or NO_PARAMETERS
    what = f"{where}.function.parameters"
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise field_error(f"{what} must be a JSON schema of an object; it is {shown(parameters)}")
    described = {key: each for key, each in function.items() if each is not None}
    schema = schema_text(what, {"type": "object"} | parameters)
    return Tool(name, schema, {"type": "function", "function": described})


def _tool_choice(value: Any) -> str:
    """none, auto, required; or `=` and the name of a tool."""
    if value in ("none", "auto", "required"):
        return str(value)
    function = value.get("function") if isinstance(value, dict) else None
    if isinstance(function, dict) and value.get("type") == "function":
        name = function.get("name")
        if isinstance(name, str) and NAME.fullmatch(name):
            return f"={name}"
    raise field_error(f"tool_choice must be {TOOL_CHOICE}; it is {shown(value)}")


Tools = Annotated[tuple[Tool, ...], PlainValidator(_tools, json_schema_input_type=list[ToolObject])]
ToolChoice = Annotated[
    str,
    PlainValidator(
        _tool_choice, json_schema_input_type=Literal["none", "auto", "required"] | NamedTool
    ),
]


@dataclass(frozen=True, slots=True)
class CallOptions:
    """Which tools an answer may call. is_required: whether it must. is_parallel: several times."""

    tools: tuple[Tool, ...]
    is_required: bool
    is_parallel: bool


def call_options(
    tools: Sequence[Tool], choice: str | None, is_parallel: bool
) -> CallOptions | None:
    """The options that a body's fields mean; None for text alone. Raises ApiError."""
    if choice == "none" or (not tools and choice in (None, "auto")):
        return None
    if not tools:
        raise invalid("tool_choice", "tool_choice needs tools: leave it out, or send them")
    if choice is None or not choice.startswith("="):
        return CallOptions(tuple(tools), choice == "required", is_parallel)
    named = tuple(tool for tool in tools if tool.name == choice[1:])
    if not named:
        names = ", ".join(tool.name for tool in tools)
        message = f"tool_choice must name one of tools ({names}); it names {shown(choice[1:])}"
        raise invalid("tool_choice", message)
    return CallOptions(named, is_required=True, is_parallel=False)


def message_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls of an earlier answer as templates take them: with the arguments as an object.

    Raises a field error.
    """
    if not isinstance(value, list):
        raise field_error(f"{where} must be a list of {CALL}; it is {shown(value)}")
    return [_call(each, f"{where}[{place}]") for place, each in enumerate(value)]


def _call(value: Any, where: str) -> dict[str, Any]:
    given = value if isinstance(value, dict) else {}
    function = given.get("function")
    called = function if isinstance(function, dict) else {}
    call_id, name, arguments = given.get("id", ""), called.get("name"), called.get("arguments")
    for what, text in (("id", call_id), ("name", name), ("arguments", arguments)):
        if not isinstance(text, str):
            raise field_error(f"{where} must be {CALL}; its {what} is {shown(text)}")
        check_text(f"{where}.{what}", text)
    assert isinstance(arguments, str)
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):  # cut by max_tokens: it is what the model said
        parsed = None
    call = {"name": name, "arguments": parsed if isinstance(parsed, dict) else arguments}
    return {"id": call_id, "type": "function", "function": call}

"""Fields that say what a text has to be, in OpenAI's and vLLM's names, as the engine takes them."""

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, ValidationInfo

from cottention.engine.structured_output import StructuredOutput, StructureKind, TextStructure
from cottention.server.http.body import shown
from cottention.server.http.errors import invalid
from cottention.server.schemas.base import RequestModel
from cottention.server.schemas.field_types import check_text, field_error

ANY_OBJECT = '{"type": "object"}'

SCHEMA = "a JSON schema, as an object or its text"
CHOICES = "a list of texts that are not empty"
TEXT = "a text that is not empty"
RESPONSE_FORMAT = (
    '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema":'
    ' {"name": ..., "schema": {...}}}'
)
STRUCTURED = "an object with one of json, json_object, regex, choice and grammar"


class NamedJsonSchema(BaseModel):
    """A JSON schema with a name. Answers always follow it, whatever `strict` says."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedJsonSchema | None = None


class StructuredOutputs(BaseModel):
    """vLLM's way to say what a text has to be. One of the first five is given."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None


def _given(value: dict[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in value.items() if each is not None}


def schema_text(name: str, value: Any) -> str:
    """A JSON schema as the text of an object. Raises a field error."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise field_error(f"{name} must be {SCHEMA}; its text is no JSON") from None
    if not isinstance(value, (dict, bool)):
        raise field_error(f"{name} must be {SCHEMA}; it is {shown(value)}")
    try:
        text = json.dumps(value)
        text.encode()
    except RecursionError:
        raise field_error(f"{name} is nested too deeply") from None
    return text


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise field_error(f"{name} must be {TEXT}; it is {shown(value)}")
    check_text(name, value)
    return value


def _choices(name: str, value: Any) -> str:
    if not isinstance(value, list) or not value:
        raise field_error(f"{name} must be {CHOICES}; it is {shown(value)}")
    for place, each in enumerate(value):
        _text(f"{name}[{place}]", each)
    return json.dumps(value)


_READERS: Mapping[StructureKind, Callable[[str, Any], str]] = {
    "json_schema": schema_text,
    "regex": _text,
    "choice": _choices,
    "grammar": _text,
}


def _response_format(value: Any, info: ValidationInfo) -> TextStructure | None:
    name = str(info.field_name)
    given = _given(value) if isinstance(value, dict) else {}
    kind = given.pop("type", None)
    inner = given.pop("json_schema", None)
    if given or kind not in ("text", "json_object", "json_schema"):
        found = f"it is {shown(value)}"
        if isinstance(value, dict):
            other = f"it has the unknown field {shown(next(iter(given)))}" if given else ""
            found = other or f"its type is {shown(kind)}"
        raise field_error(f"{name} must be {RESPONSE_FORMAT}; {found}")
    if kind != "json_schema":
        return TextStructure("json_schema", ANY_OBJECT, param=name) if kind != "text" else None
    if not isinstance(inner, dict):
        raise field_error(f"{name} must be {RESPONSE_FORMAT}; its json_schema is {shown(inner)}")
    where = f"{name}.json_schema.schema"
    schema = schema_text(where, inner.get("schema") or {"type": "object"})
    return TextStructure("json_schema", schema, param=name)


_KINDS: Mapping[str, StructureKind] = {
    "json": "json_schema",
    "json_object": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}


def _structured_outputs(value: Any, info: ValidationInfo) -> TextStructure | None:
    name = str(info.field_name)
    if not isinstance(value, dict):
        raise field_error(f"{name} must be {STRUCTURED}; it is {shown(value)}")
    given = _given(value)
    if given.get("json_object") is False:
        del given["json_object"]
    whitespace = given.pop("whitespace_pattern", None)
    if whitespace is not None:
        _text(f"{name}.whitespace_pattern", whitespace)
    for option in ("disable_any_whitespace", "disable_additional_properties"):
        found = given.pop(option, True)  # they are how JSON is written, whatever is asked
        if not isinstance(found, bool):
            raise field_error(f"{name}.{option} must be true or false; it is {shown(found)}")
    if len(given) != 1 or not given.keys() <= _KINDS.keys():
        names = ", ".join(given) or "none"
        raise field_error(f"{name} must be {STRUCTURED}; it has {shown(names)}")
    [(key, asked)] = given.items()
    if key == "json_object":
        if asked is not True:
            raise field_error(f"{name}.json_object must be true or false; it is {shown(asked)}")
        asked = ANY_OBJECT
    kind = _KINDS[key]
    return TextStructure(kind, _READERS[kind](f"{name}.{key}", asked), whitespace, name)


def _guided(value: Any, info: ValidationInfo) -> TextStructure:
    name = str(info.field_name)
    kind = _KINDS[name.removeprefix("guided_")]
    return TextStructure(kind, _READERS[kind](name, value), param=name)


ResponseFormatField = Annotated[
    TextStructure | None,
    PlainValidator(_response_format, json_schema_input_type=ResponseFormat),
]
StructuredOutputsField = Annotated[
    TextStructure | None,
    PlainValidator(_structured_outputs, json_schema_input_type=StructuredOutputs),
]
GuidedJson = Annotated[
    TextStructure, PlainValidator(_guided, json_schema_input_type=dict[str, Any] | str)
]
GuidedText = Annotated[TextStructure, PlainValidator(_guided, json_schema_input_type=str)]
GuidedChoice = Annotated[TextStructure, PlainValidator(_guided, json_schema_input_type=list[str])]

FIELDS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)


class StructuredFields(RequestModel):
    """Fields that say what a text has to be; at most one of them is used."""

    response_format: ResponseFormatField = Field(None, description=RESPONSE_FORMAT)
    structured_outputs: StructuredOutputsField = Field(None, description=STRUCTURED)
    guided_json: GuidedJson | None = Field(None, description=SCHEMA)
    guided_regex: GuidedText | None = Field(None, description=TEXT)
    guided_choice: GuidedChoice | None = Field(None, description=CHOICES)
    guided_grammar: GuidedText | None = Field(None, description=TEXT)

    @property
    def structured(self) -> StructuredOutput | None:
        """What the text has to be, if anything. Raises ApiError where several fields say it."""
        found = {name: each for name in FIELDS if (each := getattr(self, name)) is not None}
        if len(found) > 1:
            first, second, *_ = found
            message = f"{second} is not possible with {first}: leave one of them out"
            raise invalid(second, message)
        return next(iter(found.values()), None)

"""Types of request fields: prompts, strings, token ids and biases, with validation messages."""

import re
from collections.abc import Collection
from typing import Annotated, Any, TypeVar

from pydantic import Field, PlainValidator, ValidationInfo
from pydantic_core import PydanticCustomError

from cottention.server.http.body import shown
from cottention.server.http.request_id import REQUEST_ID_PATTERN

Prompt = str | list[int]
T = TypeVar("T")

PROMPTS = "text, a list of texts, a list of token ids, or a list of lists of token ids"
BIASES = "an object of token ids, as strings, with a number from -100 to 100 each"
MAX_ID_DIGITS = 10
MAX_SHORT = 1024
MAX_AT_ONCE = 1000
"""Values of a list that are made distinct by one call."""

NUM_PARTS = 256
"""Sets that the values of a longer list are in, by their hashes."""

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
PATTERN = f"^{REQUEST_ID_PATTERN.pattern}$"


FIELD_ERROR = "field_error"
WRONG_ELEMENT = "wrong_element"


def field_error(message: str) -> PydanticCustomError:
    """An error whose message is sent to the client as it is."""
    return PydanticCustomError(FIELD_ERROR, "{message}", {"message": message})


def wrong_type() -> PydanticCustomError:
    """An error whose message is made of the field's description."""
    return PydanticCustomError("wrong_type", "wrong type")


def wrong_element(place: int, element: Any) -> PydanticCustomError:
    """The same for a list, of which one element has the wrong type."""
    found = f"at index {place} is {shown(element)}"
    return PydanticCustomError(WRONG_ELEMENT, "{found}", {"found": found})


def check_text(name: str, text: str) -> None:
    """Raise unless `text` is valid Unicode."""
    if found := LONE_SURROGATE.search(text):
        which = f"U+{ord(found[0]):04X} at index {found.start()}"
        raise field_error(f"{name} has a lone surrogate, which is not a character: {which}")


def _text(value: Any, info: ValidationInfo) -> str:
    if not isinstance(value, str):
        raise wrong_type()
    check_text(str(info.field_name), value)
    return value


def _short_text(value: Any, info: ValidationInfo) -> str:
    text = _text(value, info)
    if len(text) > MAX_SHORT:
        raise wrong_type()
    return text


def _name(value: Any) -> str:
    if not isinstance(value, str) or not REQUEST_ID_PATTERN.fullmatch(value):
        raise wrong_type()
    return value


def _prompts(value: Any, info: ValidationInfo) -> list[Prompt]:
    """One prompt or several, as text or token ids, as a list of prompts.

    What goes on from a state may have an empty prompt.
    """
    name = info.field_name
    has_past = any(info.data.get(each) is not None for each in ("session_id", "state"))
    if value in ("", []) and has_past:
        return [[]]
    match value:
        case str() | [int(), *_]:
            prompts = [value]
        case list():
            prompts = value
        case _:
            raise wrong_type()
    if not prompts:
        raise field_error(f"{name} must not be empty")
    for place, each in enumerate(prompts):
        if each in ("", []):
            where = f"; at index {place} it is" if prompts is value else ""
            raise field_error(f"{name} must not be empty{where}")
    if not (all(isinstance(each, str) for each in prompts) or all(map(_is_ids, prompts))):
        raise field_error(f"{name} must be {PROMPTS}; {describe_mismatch(value)}")
    for each in prompts:
        if isinstance(each, str):
            check_text(str(name), each)
    return prompts


def describe_mismatch(items: list[Any]) -> str:
    """Where a list of texts, of ids or of lists of ids has another element, and which.

    Its first element decides what the others should be.
    """
    expected = type(items[0]) if type(items[0]) in (str, int, list) else None
    for place, each in enumerate(items):
        if type(each) is not expected:
            return f"at index {place} is {shown(each)}"
    inside = ((i, j, each) for i, ids in enumerate(items) for j, each in enumerate(ids))
    return next(
        f"at index {j} of the list at index {i} is {shown(each)}"
        for i, j, each in inside
        if type(each) is not int
    )


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in value)


def _texts(value: Any, info: ValidationInfo) -> tuple[str, ...]:
    """One string or a list of them."""
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list):
        raise wrong_type()
    for place, each in enumerate(strings):
        if not isinstance(each, str):
            raise wrong_element(place, each)
        check_text(str(info.field_name), each)
    return tuple(strings)


def _strings(value: Any, info: ValidationInfo) -> tuple[str, ...]:
    return _distinct(_texts(value, info))


def _listed_strings(value: Any, info: ValidationInfo) -> tuple[str, ...]:
    if isinstance(value, str):
        raise wrong_type()
    return _strings(value, info)


def _token_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise wrong_type()
    for place, each in enumerate(value):
        if type(each) is not int:
            raise wrong_element(place, each)
    return tuple(value)


def _distinct_ids(value: Any) -> tuple[int, ...]:
    return _distinct(_token_ids(value))


def _distinct(values: Collection[T]) -> tuple[T, ...]:
    """Each value once, in order.

    Of many, in a loop and into many small sets, so that other threads have turns meanwhile: one set
    of all keeps the interpreter while it is made in C, and each time that it grows.
    """
    if len(values) <= MAX_AT_ONCE:
        return tuple(dict.fromkeys(values))
    distinct: list[T] = []
    seen: list[set[T]] = [set() for _ in range(NUM_PARTS)]
    for value in values:
        part = seen[hash(value) % NUM_PARTS]
        if value not in part:
            part.add(value)
            distinct.append(value)
    for part in seen:
        part.clear()  # here, not all of them together at the return
    return tuple(distinct)


def _biases(value: Any) -> dict[int, float]:
    """JSON keys are strings; each must be a token id in decimal, without leading zeros."""
    if not isinstance(value, dict):
        raise wrong_type()
    for key, bias in value.items():
        if isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise field_error(f"logit_bias must be {BIASES}; {shown(key)} has {shown(bias)}")
        if not _is_id(key):
            raise field_error(f"logit_bias must be {BIASES}; {shown(key)} is not a token id")
    return {int(key): bias for key, bias in value.items()}


def _is_id(key: str) -> bool:
    is_digits = key.isascii() and key.isdecimal() and len(key) <= MAX_ID_DIGITS
    return is_digits and str(int(key)) == key


Text = Annotated[str, PlainValidator(_text, json_schema_input_type=str)]
ShortText = Annotated[
    str,
    PlainValidator(_short_text, json_schema_input_type=Annotated[str, Field(max_length=MAX_SHORT)]),
]
"""A name that is looked up or kept, and of which nothing is processed."""
Name = Annotated[
    str, PlainValidator(_name, json_schema_input_type=Annotated[str, Field(pattern=PATTERN)])
]
Prompts = Annotated[
    list[Prompt],
    PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
Texts = Annotated[tuple[str, ...], PlainValidator(_texts, json_schema_input_type=str | list[str])]
"""One text or several, each of which is answered."""
Strings = Annotated[
    tuple[str, ...], PlainValidator(_strings, json_schema_input_type=str | list[str])
]
"""A set of strings, likewise below: what is repeated counts once."""
ListedStrings = Annotated[
    tuple[str, ...], PlainValidator(_listed_strings, json_schema_input_type=list[str])
]
TokenIds = Annotated[tuple[int, ...], PlainValidator(_token_ids, json_schema_input_type=list[int])]
DistinctIds = Annotated[
    tuple[int, ...], PlainValidator(_distinct_ids, json_schema_input_type=list[int])
]
"""A set of ids: what is repeated counts once, so that it has no more than the vocabulary."""
Biases = Annotated[
    dict[int, float], PlainValidator(_biases, json_schema_input_type=dict[str, float])
]

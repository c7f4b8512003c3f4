"""Long bodies are parsed as short ones are, and in steps between which other threads may run."""

import contextlib
import json
from typing import Any

import pytest

from cottention.server.http.errors import ApiError
from cottention.server.http.json_body import (
    MAX_AT_ONCE,
    MAX_CONTAINERS,
    MAX_NAMES,
    parse_object,
)
from tests.short_steps import takes_short_steps

PADDING = f'"padding": "{"x" * MAX_AT_ONCE}"'
"""What makes a body long."""


@pytest.mark.parametrize("elements", [b"1," * (4 << 20), b"[]," * (1 << 20)], ids=["ids", "lists"])
def test_no_step_of_a_long_body_keeps_the_interpreter(elements: bytes) -> None:
    def parse() -> None:
        with contextlib.suppress(ApiError):
            parse_object(b'{"a": [' + elements + b"0]}")

    assert takes_short_steps(parse)


@pytest.mark.parametrize(
    "value",
    [
        [*range(MAX_AT_ONCE)],
        [0.25, -1, 1e300, -2.5e-7] * 5000,
        [[*range(1000)], [*range(1000)]] * 50,
        [1] * 5000 + ["a", None, {"b": [1] * 5000}] + [2] * 5000,
        {"a": {"b": [True, False, "\u2028\U0001f600", {}, []]}},
        [],
    ],
    ids=["ids", "numbers", "lists", "mixed", "nested", "empty"],
)
@pytest.mark.parametrize("separators", [(",", ":"), (" ,\n\t", " : ")], ids=["dense", "spaced"])
def test_a_long_body_has_the_values_of_a_short_one(value: Any, separators: tuple[str, str]) -> None:
    text = json.dumps(value, separators=separators, ensure_ascii=False)
    raw = f'{{{PADDING}, "value": {text}}}'.encode()
    assert parse_object(raw)["value"] == value


ONES = "1," * 1000


@pytest.mark.parametrize(
    "text",
    [f"[{ONES}]", f"[{ONES},1]", f"[,{ONES}1]", f"[{ONES}01]", f"[{ONES}1.]", f"[{ONES}1 1]", "[1"],
)
def test_what_is_no_json_is_refused_at_its_place(text: str) -> None:
    raw = f'{{{PADDING}, "value": {text}}}'
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(raw)
    with pytest.raises(ApiError) as found:
        parse_object(raw.encode())
    assert str(found.value).endswith(str(expected.value))


@pytest.mark.parametrize("raw", [b"", b" \r\n"])
def test_an_empty_body_is_told_what_to_send(raw: bytes) -> None:
    with pytest.raises(ApiError, match=r"it is empty: send \{\}"):
        parse_object(raw)


@pytest.mark.parametrize("text", ["\u0661", "[1,\u0661.5]"])
def test_digits_of_other_scripts_are_no_json(text: str) -> None:
    with pytest.raises(ApiError, match="not JSON"):
        parse_object(f'{{{PADDING}, "value": {text}}}'.encode())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"[{'[],' * MAX_CONTAINERS}1]", f"more than {MAX_CONTAINERS} lists and objects"),
        (f"[{'{},' * MAX_CONTAINERS}1]", f"more than {MAX_CONTAINERS} lists and objects"),
        (json.dumps(dict.fromkeys(map(str, range(MAX_NAMES + 1)))), f"has {MAX_NAMES + 1} names"),
    ],
    ids=["lists", "objects", "names"],
)
def test_lists_objects_and_names_are_bounded(text: str, says: str) -> None:
    with pytest.raises(ApiError, match=says):
        parse_object(f'{{{PADDING}, "value": {text}}}'.encode())

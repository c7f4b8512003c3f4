"""A `StructuredOutput` as a grammar of llguidance's: JSON schemas, patterns, texts, calls."""

import json
import re
import string
from collections.abc import Mapping
from typing import Any

from cottention.engine.structured_output import CallStructure, StructuredOutput, TextStructure

ANY_TEXT = r"/(.|\n)*/"

JSON_STYLE: Mapping[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": False,
    "lenient": False,
}
"""One way to write a value: a model that may write white space may write it without end."""

LARGEST = 2**53 - 1
"""Of integers without bounds: what every reader of JSON takes."""

SAFE_ESCAPES = "nrbtf"
"""Beside a pattern with [^...]: in 1.9.1 it lets an excluded quote or backslash pass, escaped."""

Specials = Mapping[str, int]
"""Ids of special tokens by their spellings."""


def library_grammar(structure: StructuredOutput, specials: Specials) -> str:
    """The grammar as llguidance reads it. Raises ValueError for what is no such description."""
    if isinstance(structure, CallStructure):
        return _calls(structure, specials)
    return _text(structure)


def _text(structure: TextStructure) -> str:
    from llguidance import LLMatcher, grammar_from

    match structure.kind:
        case "json_schema":
            schema = _styled(json.loads(structure.text), structure.whitespace)
            return LLMatcher.grammar_from_json_schema(json.dumps(schema))
        case "regex":
            return LLMatcher.grammar_from_regex(structure.text)
        case "choice":
            texts = json.loads(structure.text)
            return LLMatcher.grammar_from_regex("|".join(map(_escaped, texts)))
        case "grammar":
            return grammar_from("grammar", structure.text)


def _styled(schema: Any, whitespace: str | None = None) -> dict[str, Any]:
    """A schema with the options of its JSON, in place of any that it brings."""
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema must be an object")
    style = dict(JSON_STYLE)
    if whitespace is not None:
        style |= {"whitespace_pattern": whitespace, "item_separator": ",", "key_separator": ":"}
        del style["whitespace_flexible"]
    if "[^" in json.dumps(schema):
        style["json_allowed_escapes"] = SAFE_ESCAPES
    is_combined = '"allOf"' in json.dumps(schema)  # what it combines may be anywhere, by $ref
    return {**_closed(schema, is_part=is_combined), "x-guidance": style}


_COMBINING = {"anyOf", "oneOf", "$ref", "if", "not", "patternProperties"}
"""Keywords beside which an object's properties are not all that it may have."""


def _closed(schema: Any, *, is_part: bool = False) -> Any:
    """A schema whose objects have no other properties than those it names, unless it says so.

    Its integers are at most LARGEST. All that follows it follows the given one, too. Models add
    properties and digits without end otherwise.
    is_part: of a schema that others are combined with, which is left as it is.
    """
    if isinstance(schema, list):
        return [_closed(each, is_part=is_part) for each in schema]
    if not isinstance(schema, dict) or is_part:
        return schema
    found: dict[str, Any] = dict(schema)
    for name, value in schema.items():
        if name in ("properties", "$defs", "definitions") and isinstance(value, dict):
            found[name] = {key: _closed(each) for key, each in value.items()}
        elif name in ("items", "prefixItems", "additionalProperties"):
            found[name] = _closed(value)
        elif name in ("anyOf", "oneOf"):
            found[name] = _closed(value, is_part="properties" in schema)
    if "properties" in schema and not _COMBINING & schema.keys():
        found.setdefault("additionalProperties", False)
    if schema.get("type") == "integer" and not {"enum", "const", "multipleOf"} & schema.keys():
        low = schema.get("minimum", schema.get("exclusiveMinimum"))
        high = schema.get("maximum", schema.get("exclusiveMaximum"))
        if low is None and (high is None or high > -LARGEST):
            found["minimum"] = -LARGEST
        if high is None and (low is None or low < LARGEST):
            found["maximum"] = LARGEST
    return found


def _escaped(text: str) -> str:
    """A text as a pattern that matches only it."""
    special = set(string.punctuation) - set("<>\"'`/!%,:;=@_")
    return "".join(f"\\{each}" if each in special else each for each in text)


def _calls(structure: CallStructure, specials: Specials) -> str:
    """Calls, after any text or in place of it where they are not required.

    What stands before a call's value is one string, because a lexeme of free text that begins like
    it would swallow a part of it.
    """
    start, opening = _start(structure, specials)

    def any_call(before: str) -> str:
        ways = (
            " ".join([*_literals(before + call.begin, specials), f"call_{place}"])
            for place, call in enumerate(structure.calls)
        )
        return f"({' | '.join(ways)})"

    calls = [any_call(opening)]
    if structure.is_parallel:
        calls.append(f"{any_call(structure.separator)}*")
    rules = [*start, f"calls: {' '.join([*calls, *_literals(structure.closing, specials)])}"]
    for place, call in enumerate(structure.calls):
        value = f"%json {json.dumps(_styled(json.loads(call.schema)))}"
        rules.append(f"call_{place}: {' '.join([value, *_literals(call.end, specials)])}")
    return "\n".join(rules)


def _start(structure: CallStructure, specials: Specials) -> tuple[list[str], str]:
    """The first rules, and what the calls begin with after them."""
    trigger, opening = structure.trigger, structure.opening
    if not trigger:
        return ["start: calls"], opening
    if not structure.follows_text:
        pattern = _escaped(trigger).replace("/", "\\/")
        return ["start: calls | FREE", rf"FREE: {ANY_TEXT} & ~/{pattern}(.|\n)*/"], opening
    # A lazy lexeme ends with the trigger: a text that has it goes on with a call.
    if trigger in specials:
        head = f"head: {ANY_TEXT} {_token(specials[trigger])}"
    else:
        head = f"head[lazy]: {ANY_TEXT} {json.dumps(trigger)}"
    rules = ["start: FREE | head calls", head, f"FREE: {ANY_TEXT}"]
    return rules, opening.removeprefix(trigger)


def _literals(text: str, specials: Specials) -> list[str]:
    """A text as symbols of a rule: its strings, and the special tokens that it spells."""
    if not text:
        return []
    spelled = "|".join(re.escape(each) for each in sorted(specials, key=len, reverse=True))
    parts = re.split(f"({spelled})", text) if spelled else [text]
    return [
        _token(specials[part]) if part in specials else json.dumps(part) for part in parts if part
    ]


def _token(token_id: int) -> str:
    return f"<[{token_id}]>"

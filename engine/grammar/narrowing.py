"""A JSON schema narrowed to answers that end: all that follows it follows the given one, too.

Models, small ones first of all, add properties, digits and characters without end where a schema
lets them.
"""

from decimal import Decimal
from typing import Any

LARGEST = 2**53 - 1
"""Of numbers without bounds: what every reader of JSON takes."""

FRACTION_STEP = 1e-9
"""Numbers are multiples of it: the finest that the library takes."""

MAX_PATTERN_LENGTH = 1024
MAX_FORMAT_LENGTH = 256
"""Characters of strings that have a pattern or a format and no `maxLength`."""

_COMBINING = {"anyOf", "oneOf", "$ref", "if", "not", "patternProperties"}
"""Keywords beside which an object's properties are not all that it may have."""

_MAPPINGS = ("properties", "$defs", "definitions", "patternProperties")
_PARTS = ("items", "prefixItems", "additionalProperties")


def narrowed(schema: Any, *, is_part: bool = False) -> Any:
    """A schema whose answers end.

    Its objects have no other properties than those it names, unless it says so. Its numbers lie
    between ±LARGEST and are multiples of FRACTION_STEP. Its strings with a pattern or a format have
    a greatest length.
    is_part: of a schema that others are combined with: its objects are left as they are.
    """
    if isinstance(schema, list):
        return [narrowed(each, is_part=is_part) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = dict(schema)
    for name, value in schema.items():
        if name in _MAPPINGS and isinstance(value, dict):
            found[name] = {key: narrowed(each) for key, each in value.items()}
        elif name in _PARTS:
            found[name] = narrowed(value)
        elif name in ("anyOf", "oneOf"):
            found[name] = narrowed(value, is_part=is_part or "properties" in schema)
    if "properties" in schema and not is_part and not _COMBINING & schema.keys():
        found.setdefault("additionalProperties", False)
    if not {"enum", "const"} & schema.keys():
        found |= _number_bounds(schema) | _length_bound(schema)
    return found


def _number_bounds(schema: dict[str, Any]) -> dict[str, Any]:
    """Bounds of a schema of numbers that lacks them: nothing where they would leave no number."""
    kinds = schema.get("type")
    kinds = {kinds} if isinstance(kinds, str) else {*(kinds or ())}
    if not {"integer", "number"} & kinds:
        return {}
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    found: dict[str, Any] = {}
    if low is None and (high is None or high > -LARGEST):
        found["minimum"] = -LARGEST
    if high is None and (low is None or low < LARGEST):
        found["maximum"] = LARGEST
    if "number" in kinds and "multipleOf" not in schema and all(map(_is_coarse, (low, high))):
        found["multipleOf"] = FRACTION_STEP
    return found


def _is_coarse(bound: float | None) -> bool:
    """Whether there are multiples of FRACTION_STEP at this bound and between it and another."""
    return bound is None or Decimal(repr(bound)) % Decimal(repr(10 * FRACTION_STEP)) == 0


def _length_bound(schema: dict[str, Any]) -> dict[str, Any]:
    """A greatest length for strings whose pattern or format may not have one."""
    bounds = {"pattern": MAX_PATTERN_LENGTH, "format": MAX_FORMAT_LENGTH}
    bound = min((bounds[each] for each in bounds if each in schema), default=None)
    if bound is None or "maxLength" in schema or schema.get("minLength", 0) > bound:
        return {}
    return {"maxLength": bound}

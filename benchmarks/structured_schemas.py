"""JSON schemas of our own making, for the benchmark of structured output and its tests.

They are built from small parts, so that each kind of keyword stands alone, nested, optional, in an
array and beside others. Their order and contents are the same in every run.
"""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

Schema = dict[str, Any]


class NamedSchema(NamedTuple):
    """A schema, and a name that says what it is about: a group and a number."""

    name: str
    schema: Schema


def all_schemas() -> list[NamedSchema]:
    """Every schema, at least 300."""
    groups = {
        "scalar": list(_scalars()),
        "enum": list(_enums()),
        "string": list(_strings()),
        "pattern": list(_patterns()),
        "format": list(_formats()),
        "number": list(_numbers()),
        "array": list(_arrays()),
        "object": list(_objects()),
        "nested": list(_nested()),
        "ref": list(_refs()),
        "union": list(_unions()),
        "record": list(_records()),
    }
    return [
        NamedSchema(f"{group}-{place}", schema)
        for group, schemas in groups.items()
        for place, schema in enumerate(schemas)
    ]


def _object(properties: dict[str, Schema], **more: Any) -> Schema:
    """An object of exactly these properties, all of them required, unless `more` says otherwise."""
    fixed = {"required": [*properties], "additionalProperties": False}
    return {"type": "object", "properties": properties} | fixed | more


def _array(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items} | more


STRING: Schema = {"type": "string"}
SHORT: Schema = {"type": "string", "maxLength": 12}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}
COLOR: Schema = {"enum": ["red", "green", "blue"]}
LEAVES = (STRING, SHORT, INTEGER, NUMBER, BOOLEAN, NULL, COLOR)


def _scalars() -> Iterator[Schema]:
    for leaf in LEAVES:
        yield leaf
        yield _object({"value": leaf})
        yield {"type": [*dict.fromkeys([leaf.get("type", "string"), "null"])]}


def _enums() -> Iterator[Schema]:
    yield {"const": "only"}
    yield {"const": 7}
    yield {"const": {"a": [1, None, True]}}
    yield {"enum": [1, 2, 3]}
    yield {"enum": ["a", 1, None, True]}
    yield {"enum": [[1, 2], {"k": "v"}]}
    yield {"type": "string", "enum": ["é", 'say "x"', "tab\t", "漢字", ""]}
    yield {"type": "integer", "enum": [10, 100, 1000]}
    for num in (2, 20, 200):
        yield {"enum": [f"word{place}" for place in range(num)]}
        yield _object({"kind": {"enum": [f"k-{place:03}" for place in range(num)]}, "n": INTEGER})
        yield _array({"enum": [place * place for place in range(num)]}, maxItems=4)


def _strings() -> Iterator[Schema]:
    for low, high in ((0, 0), (1, 1), (0, 5), (3, 8), (10, 10), (0, 64), (20, 200)):
        yield {"type": "string", "minLength": low, "maxLength": high}
        yield _object({"text": {"type": "string", "minLength": low, "maxLength": high}})
    yield {"type": "string", "minLength": 4}
    yield _array({"type": "string", "maxLength": 3}, minItems=2, maxItems=5)


PATTERNS = (
    r"^[a-z]+$",
    r"^[A-Z][a-z]{2,8}$",
    r"^\d{4}-\d{2}-\d{2}$",
    r"^(yes|no|maybe)$",
    r"^#[0-9a-fA-F]{6}$",
    r"^[^\"\\]{1,20}$",
    r"^v\d+\.\d+\.\d+(-[a-z]+)?$",
    r"^(\+\d{1,3} )?\d{3}-\d{4}$",
    r"[0-9]",
    r"^a",
    r"z$",
    r"^[\w.]+@[\w.]+\.[a-z]{2,4}$",
    r"^(ab|cd){1,3}$",
    r"^.{3,6}$",
    r"^[àéîõü]{2,5}$",
    r"^(?:[01]\d|2[0-3]):[0-5]\d$",
)


def _patterns() -> Iterator[Schema]:
    for pattern in PATTERNS:
        yield {"type": "string", "pattern": pattern}
        yield _object({"code": {"type": "string", "pattern": pattern}, "ok": BOOLEAN})
    yield {"type": "string", "pattern": r"^[a-z]*$", "minLength": 2, "maxLength": 6}
    yield _array({"type": "string", "pattern": r"^[A-Z]{3}$"}, minItems=1, maxItems=3)
    yield {"type": "string", "pattern": r"^(?=.*\d)[a-z\d]{4,8}$"}
    yield {"type": "string", "pattern": r"^(\w)\1$"}


FORMATS = ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid")


def _formats() -> Iterator[Schema]:
    for name in (*FORMATS, "uri"):
        yield {"type": "string", "format": name}
        yield _object({"at": {"type": "string", "format": name}})
    yield {"type": "string", "format": "made-up"}


def _numbers() -> Iterator[Schema]:
    bounds: tuple[Schema, ...] = (
        {"minimum": 0},
        {"maximum": 100},
        {"minimum": 0, "maximum": 9},
        {"minimum": -50, "maximum": 50},
        {"exclusiveMinimum": 0, "exclusiveMaximum": 10},
        {"minimum": 1000, "maximum": 1_000_000},
        {"minimum": 7, "maximum": 7},
    )
    for kind in ("integer", "number"):
        for bound in bounds:
            yield {"type": kind} | bound
            yield _object({"x": {"type": kind} | bound, "y": {"type": kind}})
    for step in (2, 5, 10):
        yield {"type": "integer", "multipleOf": step}
        yield {"type": "integer", "multipleOf": step, "minimum": 0, "maximum": 100}
    yield {"type": "number", "multipleOf": 0.5}
    yield {"type": "number", "minimum": -0.5, "maximum": 0.5}
    yield {"type": "number", "minimum": 0.001, "maximum": 0.002}
    yield _array({"type": "integer", "minimum": 1, "maximum": 6}, minItems=2, maxItems=2)


def _arrays() -> Iterator[Schema]:
    for leaf in LEAVES:
        yield _array(leaf, maxItems=5)
        yield _array(leaf, minItems=2, maxItems=3)
    yield _array(INTEGER)
    yield _array(BOOLEAN, minItems=1)
    yield _array(COLOR, minItems=3, maxItems=3)
    yield {"type": "array", "prefixItems": [INTEGER, SHORT], "items": False, "minItems": 2}
    yield {"type": "array", "prefixItems": [BOOLEAN], "items": INTEGER, "maxItems": 4}
    yield _array(_array(INTEGER, maxItems=3), maxItems=3)
    yield _array(_object({"id": INTEGER, "tag": COLOR}), minItems=1, maxItems=3)
    yield {"type": "array", "maxItems": 0}
    yield _array(INTEGER, uniqueItems=True, maxItems=3)
    yield _array(INTEGER, contains={"const": 1}, maxItems=3)
    yield _object({"rows": _array(_array(NUMBER, minItems=2, maxItems=2), minItems=2, maxItems=2)})


def _objects() -> Iterator[Schema]:
    for num in (1, 3, 8):
        properties = {f"field_{place}": LEAVES[place % len(LEAVES)] for place in range(num)}
        yield _object(properties)
        yield _object(properties, required=[])
        yield _object(properties, required=[next(iter(properties))])
        yield _object(properties, additionalProperties={"type": "integer", "maximum": 9})
    yield {"type": "object", "additionalProperties": INTEGER, "maxProperties": 3}
    yield {"type": "object", "additionalProperties": BOOLEAN}
    yield {"type": "object", "properties": {}, "additionalProperties": False}
    yield {"type": "object"}
    yield _object({"a": SHORT}, patternProperties={"^n_": INTEGER})
    yield {"type": "object", "propertyNames": {"pattern": "^[a-z]{1,3}$"}}
    yield {"type": "object", "minProperties": 1, "additionalProperties": INTEGER}
    yield _object({"a": BOOLEAN, "b": SHORT}, required=[], dependentRequired={"b": ["a"]})
    yield _object({"a b": SHORT, "c-d": INTEGER, "é": BOOLEAN, 'q"': NULL})
    yield _object({"": INTEGER})


def _nested() -> Iterator[Schema]:
    """Leaves below one to six levels of objects and arrays."""
    for depth in range(1, 7):
        for leaf in (SHORT, INTEGER, COLOR):
            schema = leaf
            for level in range(depth):
                schema = (
                    _object({f"level_{level}": schema})
                    if level % 2 == 0
                    else _array(schema, minItems=1, maxItems=2)
                )
            yield schema
    tree = _object({"name": SHORT, "size": INTEGER})
    for width in (2, 4):
        yield _object({f"part_{place}": tree for place in range(width)})
        yield _array(_object({f"p{place}": tree for place in range(width)}), maxItems=2)


def _refs() -> Iterator[Schema]:
    point = _object({"x": INTEGER, "y": INTEGER})
    to_point = {"$ref": "#/$defs/point"}
    yield _object({"at": to_point}) | {"$defs": {"point": point}}
    yield _array(to_point, minItems=1, maxItems=3) | {"$defs": {"point": point}}
    yield {"$ref": "#/$defs/point", "$defs": {"point": point}}
    yield {"$ref": "#/definitions/point", "definitions": {"point": point}}
    line = _object({"from": to_point, "to": to_point})
    yield {"$ref": "#/$defs/line", "$defs": {"point": point, "line": line}}
    yield _object({"a": SHORT, "b": {"$ref": "#/properties/a"}})
    node = _object({"value": INTEGER, "next": {"anyOf": [{"$ref": "#/$defs/node"}, NULL]}})
    yield {"$ref": "#/$defs/node", "$defs": {"node": node}}
    tree = _object({"name": SHORT, "children": _array({"$ref": "#"}, maxItems=2)})
    yield tree
    either = {"anyOf": [BOOLEAN, _array({"$ref": "#/$defs/v"}, maxItems=2)]}
    yield {"$ref": "#/$defs/v", "$defs": {"v": either}}
    for num in (5, 25):
        kinds = {f"kind_{place}": _object({"n": INTEGER, "k": COLOR}) for place in range(num)}
        uses = {name: {"$ref": f"#/$defs/{name}"} for name in kinds}
        yield _object(uses) | {"$defs": kinds}
        yield {"anyOf": [*uses.values()], "$defs": kinds}


def _unions() -> Iterator[Schema]:
    for first in (INTEGER, SHORT, NULL):
        for second in (BOOLEAN, _object({"v": INTEGER}), _array(COLOR, maxItems=2)):
            yield {"anyOf": [first, second]}
            yield _object({"either": {"anyOf": [first, second]}, "n": INTEGER})
            yield {"oneOf": [first, second]}
    cat = _object({"type": {"const": "cat"}, "lives": {"type": "integer", "maximum": 9}})
    dog = _object({"type": {"const": "dog"}, "tricks": _array(SHORT, maxItems=2)})
    yield {"anyOf": [cat, dog]}
    yield {"oneOf": [cat, dog], "discriminator": {"propertyName": "type"}}
    yield _array({"anyOf": [cat, dog]}, minItems=1, maxItems=2)
    yield {"type": ["integer", "string", "null"], "maxLength": 6}
    yield {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 12}]}
    yield {
        "allOf": [
            {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
            {"type": "object", "properties": {"b": BOOLEAN}, "required": ["b"]},
        ]
    }
    yield {"type": "string", "not": {"const": "x"}}
    yield _object({"a": BOOLEAN}) | {"if": {"properties": {"a": {"const": True}}}, "then": {}}
    yield {"anyOf": [{"type": "string", "pattern": "^a+$"}, {"type": "string", "pattern": "^b+$"}]}


WORDS = (
    *("name", "title", "count", "price", "tags", "owner", "active", "kind", "notes", "score"),
    *("created", "items", "address", "email", "status", "parent", "color", "rank", "path", "unit"),
)


def _records() -> Iterator[Schema]:
    """Random records, as an application has them: some optional fields, some lists, some groups."""
    for seed in range(40):
        yield _record(random.Random(seed), depth=1 + seed % 3)


def _record(draw: random.Random, depth: int) -> Schema:
    names = draw.sample(WORDS, draw.randint(2, 5))
    properties = {name: _field(draw, depth) for name in names}
    required = [name for name in names if draw.random() < 0.7] or names[:1]
    return _object(properties, required=required)


def _field(draw: random.Random, depth: int) -> Schema:
    leaves: list[Schema] = [
        {"type": "string", "maxLength": draw.choice((8, 20, 40))},
        {"type": "integer", "minimum": 0, "maximum": draw.choice((9, 100, 5000))},
        {"type": "number", "minimum": 0, "maximum": 1},
        {"type": "string", "enum": draw.sample(WORDS, 3)},
        {"type": "string", "pattern": draw.choice(PATTERNS[:5])},
        {"type": "string", "format": draw.choice(("date", "uuid", "email"))},
        BOOLEAN,
        {"anyOf": [{"type": "string", "maxLength": 10}, NULL]},
    ]
    kind = draw.random()
    if depth and kind < 0.25:
        return _record(draw, depth - 1)
    if depth and kind < 0.5:
        return _array(_field(draw, depth - 1), minItems=draw.randint(0, 1), maxItems=3)
    return draw.choice(leaves)

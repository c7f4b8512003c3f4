"""The published description: every field a request may have, every status an answer may have.

Owns how requests' own schemas and neutral fields become one schema, and the errors that every
endpoint shares. Does not know which endpoints there are.
"""

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI

from cottention.server.schemas.base import Body
from cottention.server.schemas.responses import ErrorBody
from cottention.server.schemas.unsupported import ANY, Neutral

Schema = dict[str, Any]
Answers = dict[int | str, Schema]

ERRORS = {
    400: "A field is wrong; `param` names it.",
    401: "A key is missing or wrong.",
    404: "There is no such model or session.",
    409: "Another turn has the session, or what was asked does not fit it.",
    410: "The events after this one are no longer kept.",
    412: "The session is not at the position of If-Match.",
    413: "The body is longer than the server takes.",
    415: "The body says that it is encoded.",
    429: "The line is full, or the key has used its allowance.",
    500: "The engine failed.",
    503: "The server takes no new work now.",
    504: "The request's time was over before its first token.",
    507: "The disk takes no more sessions.",
}

EVENTS: Schema = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "description": "Each event; its data is a chunk, an error or, at the end, [DONE].",
            "properties": {"data": {"type": "string"}},
            "required": ["data"],
        }
    }
}
NOTHING: Schema = {
    "content": {"application/json": {"schema": {"type": "object", "additionalProperties": False}}}
}
"""The body of a verb that takes no field, which may be left out."""

_BODY_ERRORS = (400, 401, 404, 413, 415, 429, 500, 503, 504)


def described(
    *bodies: type[Body],
    examples: Sequence[Schema],
    streams: bool = False,
    more: Answers | None = None,
) -> Schema:
    """What a route that takes one of these bodies, for example these, says of itself.

    more: answers beside those of every such route.
    """
    references = [{"$ref": f"#/components/schemas/{body.__name__}"} for body in bodies]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    shown = {str(place): {"value": each} for place, each in enumerate(examples)}
    content = {"application/json": {"schema": schema, "examples": shown}}
    answers: Answers = {200: {"content": EVENTS}} if streams else {}
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": answers | refusals(*_BODY_ERRORS) | (more or {}),
    }


def refusals(*statuses: int) -> Answers:
    """The errors that a route may answer with."""
    return {each: {"model": ErrorBody, "description": ERRORS[each]} for each in statuses}


def publish(app: FastAPI, bodies: Sequence[type[Body]], asks: Callable[[str], bool]) -> None:
    """Make the application's description of its routes and these bodies.

    asks: whether a path asks for a key.
    """
    made = app.openapi

    def openapi() -> Schema:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(made(), bodies, asks)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's own pages say


def _complete(
    description: Schema, bodies: Sequence[type[Body]], asks: Callable[[str], bool]
) -> Schema:
    components = description.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for body in bodies:
        schemas |= _schemas_of(body)
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in description["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own, which never leaves here
            operation["security"] = [{"key": []}] if asks(path) else []
    return description


def _schemas_of(body: type[Body]) -> dict[str, Schema]:
    """Its schema and those within it; null counts as absent wherever a field may be absent."""
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    inner = {kind.__name__: kind for kind in body.nested.values()}
    found = {name: each for name, each in schema.pop("$defs", {}).items() if name not in inner}
    for kind in inner.values():
        found |= _schemas_of(kind)
    properties = schema["properties"]
    for name in properties.keys() - set(schema.get("required", ())):
        properties[name] = _nullable(properties[name])
    properties |= _neutral(body.neutral)
    return found | {body.__name__: schema}


def _nullable(schema: Schema) -> Schema:
    if {"type": "null"} in schema.get("anyOf", ()):
        return schema
    named = {key: schema.pop(key) for key in ("title", "description", "default") if key in schema}
    return named | {"anyOf": [schema, {"type": "null"}]}


def _neutral(neutral: Neutral) -> dict[str, Schema]:
    """Fields that are not built: the values that change nothing."""
    return {
        name: {} if ANY in values else {"enum": [*values, None]} for name, values in neutral.items()
    }

"""The OpenAPI description at /openapi.json: request bodies, event streams and errors.

Bodies are validated by the endpoints, not by FastAPI, so their schemas are added here.
"""

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from cottention.server.schemas.base import RequestModel
from cottention.server.schemas.messages import PATH as MESSAGES
from cottention.server.schemas.messages import MessagesErrorBody
from cottention.server.schemas.responses import ErrorBody
from cottention.server.schemas.unsupported import ANY, NeutralValues

Schema = dict[str, Any]
Responses = dict[int | str, Schema]

ERRORS = {
    400: "A field is invalid; `param` names it.",
    401: "The API key is missing or wrong.",
    403: "The Origin or the Host of the request is not allowed.",
    404: "There is no such model, session or request.",
    409: "Another turn has the session, a request has the id, or the state does not allow it.",
    410: "The events after this one are no longer kept.",
    412: "The session is not at the position of If-Match.",
    413: "The body is too large.",
    415: "The body has a content encoding.",
    422: "The Idempotency-Key was sent with another request.",
    429: "The admission queue is full, or the key has used its allowance.",
    500: "The engine failed.",
    503: "The server does not accept new requests now.",
    504: "The request timed out before its first token.",
    507: "The disk is full.",
}

IDEMPOTENCY: Schema = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "The request is executed once for this key, and its answer repeated.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}
"""The parameter of endpoints whose requests may be sent again."""

EVENTS: Schema = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "description": "Each event's data is a chunk, an error or, at the end, [DONE].",
            "properties": {"data": {"type": "string"}},
            "required": ["data"],
        }
    }
}
EMPTY_BODY: Schema = {
    "content": {"application/json": {"schema": {"type": "object", "additionalProperties": False}}}
}
"""The body of an endpoint without fields, which may be left out."""

FORBIDDEN: Schema = {
    "description": ERRORS[403],
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}},
}
"""A response of every path, from the middleware."""

_BODY_ERRORS = (400, 401, 404, 413, 415, 429, 500, 503, 504)


def request_docs(
    *bodies: type[RequestModel],
    examples: Sequence[Schema],
    streams: bool = False,
    more: Responses | None = None,
    is_idempotent: bool = False,
) -> Schema:
    """Keyword arguments for a route with one of these bodies: its request body and errors.

    more: responses in addition to those of every such route. is_idempotent: requests may have an
    Idempotency-Key.
    """
    references = [{"$ref": f"#/components/schemas/{body.__name__}"} for body in bodies]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    shown = {str(place): {"value": each} for place, each in enumerate(examples)}
    content = {"application/json": {"schema": schema, "examples": shown}}
    responses: Responses = {200: {"content": EVENTS}} if streams else {}
    extra: Schema = {"requestBody": {"required": True, "content": content}}
    if is_idempotent:
        extra["parameters"] = [IDEMPOTENCY]
        responses |= error_responses(410, 422)
    return {
        "openapi_extra": extra,
        "responses": responses | error_responses(*_BODY_ERRORS) | (more or {}),
    }


def error_responses(*statuses: int) -> Responses:
    """The responses for these error statuses."""
    return {each: {"model": ErrorBody, "description": ERRORS[each]} for each in statuses}


def install_openapi(
    app: FastAPI, bodies: Sequence[type[RequestModel]], requires_key: Callable[[str], bool]
) -> None:
    """Make the application's OpenAPI description include these bodies.

    requires_key: whether a path requires an API key.
    """
    original = app.openapi

    def openapi() -> Schema:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(original(), bodies, requires_key)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation recommends


def _complete(
    description: Schema, bodies: Sequence[type[RequestModel]], requires_key: Callable[[str], bool]
) -> Schema:
    components = description.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for body in bodies:
        schemas |= _schemas_of(body)
    schemas |= _definitions_of(MessagesErrorBody)
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in description["paths"].items():
        for operation in operations.values():
            if operation["responses"].get("422", {}).get("description") == "Validation Error":
                del operation["responses"]["422"]  # FastAPI's own, which is never sent
            operation["responses"]["403"] = FORBIDDEN
            operation["security"] = [{"key": []}] if requires_key(path) else []
        if path.startswith(MESSAGES):
            _with_messages_errors(operations)
    return description


def _with_messages_errors(operations: Schema) -> None:
    """Errors of Anthropic's endpoints have a form of their own."""
    content = {
        "application/json": {"schema": {"$ref": "#/components/schemas/MessagesErrorBody"}},
    }
    for operation in operations.values():
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                operation["responses"][status] = response | {"content": content}


def _schemas_of(body: type[RequestModel]) -> dict[str, Schema]:
    """The schema of a body and those of its nested objects; optional fields may be null."""
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    nested = {model.__name__: model for model in body.nested.values()}
    found = {name: each for name, each in schema.pop("$defs", {}).items() if name not in nested}
    for model in nested.values():
        found |= _schemas_of(model)
    properties = schema["properties"]
    for name in properties.keys() - set(schema.get("required", ())):
        properties[name] = _nullable(properties[name])
    properties |= _unsupported(body.neutral)
    return found | {body.__name__: schema}


def _definitions_of(model: type[BaseModel]) -> dict[str, Schema]:
    """The schema of a model, and those that it refers to."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    found: dict[str, Schema] = schema.pop("$defs", {})
    return found | {model.__name__: schema}


def _nullable(schema: Schema) -> Schema:
    if {"type": "null"} in schema.get("anyOf", ()):
        return schema
    named = {key: schema.pop(key) for key in ("title", "description", "default") if key in schema}
    return named | {"anyOf": [schema, {"type": "null"}]}


def _unsupported(neutral: NeutralValues) -> dict[str, Schema]:
    """Schemas of unsupported fields: their neutral values."""
    return {
        name: {} if ANY in values else {"enum": [*values, None]} for name, values in neutral.items()
    }

"""Validation of request bodies: a model, or an ApiError that says which field to change and how."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from cottention.server.http.body import shown
from cottention.server.http.errors import ApiError, invalid
from cottention.server.schemas.field_types import FIELD_ERROR, WRONG_ELEMENT
from cottention.server.schemas.unsupported import REASONS, NeutralValues, is_neutral


class RequestModel(BaseModel):
    """Base of request bodies and their objects. A field's description completes "it must be ...".

    neutral: unsupported fields, and their values that have no effect.
    nested: fields that are objects of their own.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    neutral: ClassVar[NeutralValues] = {}
    nested: ClassVar[Mapping[str, type["RequestModel"]]] = {}


Model = TypeVar("Model", bound=RequestModel)


def validate(model: type[Model], body: Mapping[str, Any]) -> Model:
    """A body as its model; null counts as absent. Raises ApiError 400 naming the field."""
    try:
        return model.model_validate(_supported(model, body, ""))
    except ValidationError as error:
        raise _as_api_error(model, error.errors(include_url=False)[0]) from None


def _supported(model: type[RequestModel], body: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The supported fields without nulls. Raises ApiError for others without a neutral value."""
    given = {name: value for name, value in body.items() if value is not None}
    for name in given.keys() - model.model_fields.keys():
        if name not in model.neutral:
            raise _unknown(model, name, prefix)
        if not is_neutral(model.neutral[name], given.pop(name)):
            raise _unsupported(prefix + name, model.neutral[name])
    for name, inner in model.nested.items():
        if isinstance(given.get(name), dict):
            given[name] = _supported(inner, given[name], f"{prefix}{name}.")
    return given


def _unknown(model: type[RequestModel], name: str, prefix: str) -> ApiError:
    """The error for a field that does not exist, with the most similar name that does."""
    similar = get_close_matches(name, model.model_fields, n=1)
    hint = f"did you mean {similar[0]}?" if similar else "leave it out"
    return invalid(prefix + name, f"there is no field {shown(prefix + name)}: {hint}")


def _unsupported(name: str, neutral: tuple[Any, ...]) -> ApiError:
    """The error for an unsupported field: why, and which values are accepted."""
    why = f", since {REASONS[name]}" if name in REASONS else " yet"
    accepted = "leave it out" + "".join(f" or send {json.dumps(value)}" for value in neutral)
    return invalid(name, f"{name} is not supported{why}: {accepted}")


def _as_api_error(model: type[RequestModel], error: ErrorDetails) -> ApiError:
    path = [str(each) for each in error["loc"]]
    param = ".".join(path)
    if error["type"] == FIELD_ERROR:
        return invalid(param, error["msg"])
    for name in path[:-1]:
        model = model.nested[name]
    allowed = model.model_fields[path[-1]].description
    if error["type"] == "missing":
        return invalid(param, f"{param} is required; it must be {allowed}")
    found = error["msg"] if error["type"] == WRONG_ELEMENT else f"it is {shown(error['input'])}"
    return invalid(param, f"{param} must be {allowed}; {found}")

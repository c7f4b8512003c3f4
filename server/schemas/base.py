"""From a JSON object to a request of some kind, or to the one sentence that says what to change.

Owns the order of the checks and the words of a refusal. Does not know any endpoint.
"""

import json
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from cottention.server.http.body import shown
from cottention.server.http.errors import ApiError, invalid
from cottention.server.schemas.unsupported import REASONS, Neutral, is_neutral


class Body(BaseModel):
    """An object of a request. Every field's description completes the sentence "it must be".

    neutral: fields that are not built, and their values that change nothing.
    nested: fields that are objects of their own.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    neutral: ClassVar[Neutral] = {}
    nested: ClassVar[Mapping[str, type["Body"]]] = {}


Request = TypeVar("Request", bound=Body)


def checked(kind: type[Request], body: Mapping[str, Any]) -> Request:
    """A request of this kind; null counts as absent. Raises ApiError 400 naming the field."""
    try:
        return kind.model_validate(_known(kind, body, ""))
    except ValidationError as error:
        raise _as_api_error(kind, error.errors(include_url=False)[0]) from None


def _known(kind: type[Body], body: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The fields that are built, nulls left out; the others must change nothing."""
    given = {name: value for name, value in body.items() if value is not None}
    for name in given.keys() - kind.model_fields.keys():
        if name not in kind.neutral:
            raise invalid(prefix + name, f"there is no field {shown(prefix + name)}")
        if not is_neutral(kind.neutral[name], given.pop(name)):
            raise _not_built(prefix + name, kind.neutral[name])
    for name, inner in kind.nested.items():
        if isinstance(given.get(name), dict):
            given[name] = _known(inner, given[name], f"{prefix}{name}.")
    return given


def _not_built(name: str, neutral: tuple[Any, ...]) -> ApiError:
    """What may be sent for a field that is not built, and why it is not."""
    why = f", since {REASONS[name]}" if name in REASONS else " yet"
    only = "leave it out" + "".join(f" or send {json.dumps(value)}" for value in neutral)
    return invalid(name, f"{name} is not supported{why}: {only}")


def _as_api_error(kind: type[Body], error: ErrorDetails) -> ApiError:
    path = [str(each) for each in error["loc"]]
    param = ".".join(path)
    if error["type"] == "told":
        return invalid(param, error["msg"])
    for name in path[:-1]:
        kind = kind.nested[name]
    allowed = kind.model_fields[path[-1]].description
    if error["type"] == "missing":
        return invalid(param, f"{param} is required; it must be {allowed}")
    return invalid(param, f"{param} must be {allowed}; it is {shown(error['input'])}")

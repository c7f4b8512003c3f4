"""What a route's query may have; anything else is refused in the words that a body's field has."""

from typing import Any

from fastapi import Depends, Request
from pydantic import ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from cottention.server.http.body import shown
from cottention.server.http.errors import invalid
from cottention.server.schemas.field_types import told


def query_of(*names: str) -> Any:
    """For the `dependencies` of a route that takes these; an ApiError 400 for any other."""

    async def check(request: Request) -> None:
        for name in request.query_params:
            if name not in names:
                raise invalid(name, f"there is no field {shown(name)} in the query")

    return Depends(check)


def must_be(name: str, allowed: str) -> WrapValidator:
    """For the type of a parameter: a value that is none says what is `allowed`."""

    def read(given: Any, parse: ValidatorFunctionWrapHandler) -> Any:
        try:
            return parse(given)
        except ValidationError:
            raise told(f"{name} must be {allowed}; it is {shown(given)}") from None

    return WrapValidator(read)

"""Query parameters: unknown ones and invalid values are refused as in request bodies."""

from typing import Any

from fastapi import Depends, Request
from pydantic import ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from cottention.server.http.body import shown
from cottention.server.http.errors import invalid
from cottention.server.schemas.field_types import field_error


def only_query_params(*names: str) -> Any:
    """A dependency of a route that takes these query parameters; any other is an ApiError 400."""

    known = " and ".join(names)

    async def check(request: Request) -> None:
        for name in request.query_params:
            if name not in names:
                message = f"there is no field {shown(name)} in the query; it may have {known}"
                raise invalid(name, message)

    return Depends(check)


def must_be(name: str, allowed: str) -> WrapValidator:
    """A validator of a query parameter, whose error message says what is `allowed`."""

    def read(given: Any, parse: ValidatorFunctionWrapHandler) -> Any:
        try:
            return parse(given)
        except ValidationError:
            raise field_error(f"{name} must be {allowed}; it is {shown(given)}") from None

    return WrapValidator(read)

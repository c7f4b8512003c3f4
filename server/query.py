"""Names that a route's query may have; another is refused, as an unknown field of a body is."""

from typing import Any

from fastapi import Depends, Request

from server.body import shown
from server.errors import invalid


def query_of(*names: str) -> Any:
    """For the `dependencies` of a route that takes these; an ApiError 400 for any other."""

    async def check(request: Request) -> None:
        for name in request.query_params:
            if name not in names:
                raise invalid(name, f"there is no field {shown(name)} in the query")

    return Depends(check)

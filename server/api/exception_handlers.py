"""Which exception becomes which answer.

Owns the handlers, and that nothing leaves the server in another form. Knows no engine beyond its
errors.
"""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cottention.engine.errors import (
    EngineStoppedError,
    ParameterError,
    SessionError,
    SnapshotError,
    SnapshotMismatchError,
)
from cottention.server.generation.output_stream import OutputStreamClosed
from cottention.server.http.errors import (
    ApiError,
    invalid,
    session_damaged,
    session_error,
    unavailable,
)

logger = logging.getLogger("cottention")

CLIENT_CLOSED_REQUEST = 499
"""What proxies log for a client that left; it is never sent to anyone."""


def add_error_handlers(app: FastAPI) -> None:
    """Answer every exception that leaves an endpoint in the one form."""
    kinds = (ApiError, ParameterError, EngineStoppedError, SessionError, SnapshotError)
    for kind in (*kinds, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(ClientDisconnect, _nobody_there)
    app.add_exception_handler(OutputStreamClosed, _nobody_there)
    app.add_middleware(InternalErrorMiddleware)


class InternalErrorMiddleware:
    """Middleware that answers what no handler knows with a 500, and tells the log alone why.

    The framework's own would raise it again, upon which uvicorn closes the connection.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on one request."""
        has_started = False

        async def sending(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception:
            if has_started or scope["type"] != "http":
                raise
            name = scope.get("state", {}).get("request_id")
            logger.exception("an internal error at %s, request %s", scope["path"], name)
            error = ApiError(500, "an internal error; the server's log has the details")
            await error.response()(scope, receive, send)


async def _answer(request: Request, error: Exception) -> Response:
    return _as_api_error(request, error).response()


async def _nobody_there(request: Request, _: Exception) -> Response:
    logger.debug("%s %s: the client left", request.method, request.url.path)
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _as_api_error(request: Request, error: Any) -> ApiError:
    match error:
        case ApiError():
            return error
        case ParameterError():
            return invalid(error.param, str(error))
        case EngineStoppedError():
            return unavailable(str(error))
        case SessionError():
            return session_error(error)
        case SnapshotMismatchError():  # stored by a server of another model
            return ApiError(409, str(error), param="session_id", code="snapshot_mismatch")
        case SnapshotError():
            return session_damaged(error)
        case RequestValidationError():
            first = error.errors()[0]
            return invalid(str(first["loc"][-1]), first["msg"])
        case _:
            return _of_route(request, error)


def _of_route(request: Request, error: HTTPException) -> ApiError:
    """What the framework itself refuses: a path or a method that is not there."""
    path, phrase = request.url.path, HTTPStatus(error.status_code).phrase
    messages = {
        404: f"there is nothing at {path}; see /openapi.json for what there is",
        405: f"{path} does not take {request.method}",
    }
    message, headers = messages.get(error.status_code, phrase), dict(error.headers or {})
    described = request.app.openapi()["paths"]
    if error.status_code == 405 and (methods := _methods_at(path, described)):
        headers["Allow"] = ", ".join(methods)
    return ApiError(error.status_code, message, headers=headers)


def _methods_at(path: str, described: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a path takes, of all its routes; the framework tells of the first one alone."""
    here = (
        [path]
        if path in described
        else [template for template in described if compile_path(template)[0].match(path)]
    )
    return sorted({method.upper() for template in here for method in described[template]})

"""Exceptions to error responses: every error leaves the server as `{"error": {...}}`."""

import asyncio
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
)
from cottention.server.generation.async_engine import Phase
from cottention.server.generation.output_stream import OutputStreamClosed
from cottention.server.http.errors import (
    ApiError,
    invalid,
    session_error,
    unavailable,
    unreadable_session,
)

logger = logging.getLogger("cottention")

CLIENT_CLOSED_REQUEST = 499
"""What proxies log for a client that disconnected; it is never sent."""


def add_exception_handlers(app: FastAPI) -> None:
    """Turn every exception that leaves an endpoint into an error response."""
    own = (ApiError, ParameterError, EngineStoppedError, SessionError, SnapshotError)
    for exception in (*own, HTTPException, RequestValidationError):
        app.add_exception_handler(exception, _respond)
    app.add_exception_handler(ClientDisconnect, _client_left)
    app.add_exception_handler(OutputStreamClosed, _client_left)
    app.add_middleware(InternalErrorMiddleware)


class InternalErrorMiddleware:
    """Middleware that turns any other exception into a 500; only the log has the reason.

    Starlette's own raises the exception again, and uvicorn then closes the connection. uvicorn's
    shutdown cancels the tasks of requests that are not answered by then, whatever they wait for:
    they get a 503.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        has_started = False

        async def sending(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except asyncio.CancelledError:
            if has_started or scope["type"] != "http":
                raise
            await unavailable(Phase.DRAINING).response()(scope, receive, send)
        except Exception:
            if has_started or scope["type"] != "http":
                raise
            name = scope.get("state", {}).get("request_id")
            logger.exception("an internal error at %s, request %s", scope["path"], name)
            error = ApiError(500, "an internal error; the server's log has the details")
            await error.response()(scope, receive, send)


async def _respond(request: Request, error: Exception) -> Response:
    return _as_api_error(request, error).response()


async def _client_left(request: Request, _: Exception) -> Response:
    logger.debug("%s %s: the client disconnected", request.method, request.url.path)
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
        case SnapshotError():
            return unreadable_session(error)
        case RequestValidationError():
            first = error.errors()[0]
            return invalid(str(first["loc"][-1]), first["msg"])
        case _:
            return _of_route(request, error)


def _of_route(request: Request, error: HTTPException) -> ApiError:
    """The framework's own errors: an unknown path or method."""
    path, headers = request.url.path, dict(error.headers or {})
    message = HTTPStatus(error.status_code).phrase
    if error.status_code == 404:
        message = f"there is no {path}; see /openapi.json for the endpoints"
    elif error.status_code == 405:
        methods = _methods_at(path, request.app.openapi()["paths"])
        methods = methods or set(headers.get("Allow", "").split(", "))
        allowed = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
        message = f"{path} does not allow {request.method}; send {allowed}"
        headers["Allow"] = allowed
    return ApiError(error.status_code, message, headers=headers)


def _methods_at(path: str, paths: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The methods of all routes of a path; the framework reports only those of the first."""
    templates = [path]
    if path not in paths:
        templates = [each for each in paths if compile_path(each)[0].match(path)]
    return {method.upper() for each in templates for method in paths[each]}

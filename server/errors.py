"""Every refusal and failure in one form: `{"error": {"message", "type", "param", "code"}}`.

Owns the form, the statuses and the handlers that turn exceptions into answers. Knows no engine
beyond its errors.

    ApiError         what a client is told, with its status
    ReadingClosed    nobody is left to be told (reading.py)
"""

import json
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

from engine.errors import (
    ContextPolicyError,
    EngineStoppedError,
    NothingToRewindError,
    ParameterError,
    SessionBusyError,
    SessionError,
    SessionMovedError,
    SessionNotFoundError,
    SnapshotError,
    SnapshotMismatchError,
    StoreFullError,
)
from server.reading import ReadingClosed

logger = logging.getLogger("cottention")

RETRY_AFTER_SECONDS = 5
CLIENT_CLOSED_REQUEST = 499
"""What proxies log for a client that left; it is never sent to anyone."""

SESSION_ERRORS: dict[type[SessionError], tuple[int, str]] = {
    SessionNotFoundError: (404, "session_not_found"),
    SessionBusyError: (409, "session_busy"),
    NothingToRewindError: (409, "nothing_to_rewind"),
    ContextPolicyError: (409, "context_policy_settled"),
    SessionMovedError: (412, "session_moved"),
    StoreFullError: (507, "store_full"),
}
"""The status and the code of what cannot be done with a session."""


class ApiError(Exception):
    """An answer other than success: its status, what went wrong, and the field to change."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def body(self) -> str:
        """The JSON text; ASCII, so that any text a client sent can be quoted in it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error})

    def response(self) -> Response:
        """The answer to send."""
        return Response(self.body, self.status, self.headers, media_type="application/json")


def invalid(param: str | None, message: str) -> ApiError:
    """A 400: `param` names the field, `message` says what is allowed."""
    return ApiError(400, message, param=param)


def unavailable(message: str) -> ApiError:
    """A 503 that may be tried again, here or elsewhere."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return ApiError(503, message, code="unavailable", headers=headers)


def engine_failed() -> ApiError:
    """A 500 for a request that the engine took and could not finish; the log has the reason."""
    return ApiError(500, "the engine failed on this request; it may be sent again")


def of_session(error: SessionError) -> ApiError:
    """What a client is told of a session that cannot do what was asked."""
    status, code = SESSION_ERRORS[type(error)]
    return ApiError(status, str(error), param="session_id", code=code)


def damaged(error: SnapshotError) -> ApiError:
    """A 500 for a stored session whose bytes are not what they were."""
    logger.error("a stored session is damaged: %s", error)
    message = "what was stored of this session is damaged; the server's log has the details"
    return ApiError(500, message, code="session_damaged")


def add_error_handlers(app: FastAPI) -> None:
    """Answer every exception that leaves an endpoint in the one form."""
    kinds = (ApiError, ParameterError, EngineStoppedError, SessionError, SnapshotError)
    for kind in (*kinds, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(ClientDisconnect, _nobody_there)
    app.add_exception_handler(ReadingClosed, _nobody_there)
    app.add_middleware(InternalErrors)


class InternalErrors:
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
            return of_session(error)
        case SnapshotMismatchError():  # stored by a server of another model
            return ApiError(409, str(error), param="session_id", code="snapshot_mismatch")
        case SnapshotError():
            return damaged(error)
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
    here = [path] if path in described else [p for p in described if compile_path(p)[0].match(path)]
    return sorted({method.upper() for template in here for method in described[template]})

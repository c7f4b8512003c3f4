"""Error responses, all of the form `{"error": {"message", "type", "param", "code"}}`.

`ApiError` is the exception, the functions below make the common ones.
`api/exception_handlers.py` maps other exceptions to them.
"""

import json
import logging
import math
from http import HTTPStatus

from fastapi import Response

from cottention.engine.errors import (
    ContextPolicyError,
    KeyReusedError,
    NonFiniteStateError,
    NothingToRewindError,
    SessionBusyError,
    SessionError,
    SessionMovedError,
    SessionNotFoundError,
    SessionQuotaError,
    SnapshotError,
    SnapshotMismatchError,
    StateTooLargeError,
    StoreFullError,
    StoreUnavailableError,
    StoreUnreachableError,
)

logger = logging.getLogger("cottention")

RETRY_AFTER_SECONDS = 5

SESSION_ERRORS: dict[type[SessionError], tuple[int, str]] = {
    SessionNotFoundError: (404, "session_not_found"),
    SessionQuotaError: (403, "session_quota_exceeded"),
    KeyReusedError: (422, "idempotency_key_reused"),
    SessionBusyError: (409, "session_busy"),
    NothingToRewindError: (409, "nothing_to_rewind"),
    ContextPolicyError: (409, "context_policy_settled"),
    SessionMovedError: (412, "session_moved"),
    NonFiniteStateError: (500, "state_not_finite"),
    StateTooLargeError: (409, "state_too_large"),
    StoreFullError: (507, "store_full"),
    StoreUnreachableError: (503, "store_unreachable"),
    StoreUnavailableError: (507, "store_unavailable"),
}
"""Status and `code` by exception."""

_NEXT_STEPS: dict[type[SessionError], str] = {
    SessionNotFoundError: (
        ": it was never opened, was deleted, has expired or belongs to another key; GET"
        " /v1/sessions lists those there are"
    ),
    NothingToRewindError: (
        ": at most --session-checkpoints turns can be undone; a fork made before a turn keeps the"
        " session as it was"
    ),
    SessionMovedError: "; GET /v1/sessions/ID tells where it is now",
}
"""What a client can do, where the exception does not know it."""

INVALID_REQUEST = "invalid_request_error"
ERROR_TYPES = {429: "rate_limit_error"}
"""The `type` of a 4xx by status, where it is not INVALID_REQUEST."""


class ApiError(Exception):
    """An error response: its status, what went wrong, and in `param` the field to change."""

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
    def phrase(self) -> str:
        """The reason phrase of the status."""
        return HTTPStatus(self.status).phrase

    @property
    def body(self) -> str:
        """The JSON text; in ASCII, so that it can quote whatever text a client sent."""
        is_server_error = self.status >= 500
        type_ = "server_error" if is_server_error else ERROR_TYPES.get(self.status, INVALID_REQUEST)
        error = {"message": str(self), "type": type_, "param": self.param, "code": self.code}
        return json.dumps({"error": error})

    def response(self) -> Response:
        """The response to send."""
        return Response(self.body, self.status, self.headers, media_type="application/json")


def invalid(param: str | None, message: str) -> ApiError:
    """A 400; `param` names the field, `message` says what is allowed."""
    return ApiError(400, message, param=param)


def too_many(message: str, seconds: float, code: str) -> ApiError:
    """A 429 with Retry-After, in whole seconds and at least 1."""
    headers = {"Retry-After": str(max(1, math.ceil(seconds)))}
    return ApiError(429, message, code=code, headers=headers)


def unavailable(message: str) -> ApiError:
    """A 503 with Retry-After."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return ApiError(503, message, code="unavailable", headers=headers)


def expired() -> ApiError:
    """A 504 for a request whose deadline passed before anything was generated."""
    message = "the request timed out before its first token; retry later or with a longer timeout"
    return ApiError(504, message, code="timeout")


def engine_failed() -> ApiError:
    """A 500 for a request that the engine accepted and could not finish."""
    return ApiError(500, "the engine failed on this request; see the server's log for the reason")


def turn_failed() -> ApiError:
    """A 500 for a turn whose output was generated and whose session is as it was before it."""
    return ApiError(500, "the turn could not be stored; see the server's log for the reason")


def session_error(error: SessionError) -> ApiError:
    """The response to an operation that a session does not allow."""
    status, code = SESSION_ERRORS[type(error)]
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 503 else None
    message = f"{error}{_NEXT_STEPS.get(type(error), '')}"
    return ApiError(status, message, param="session_id", code=code, headers=headers)


def bad_snapshot(error: SnapshotError, param: str | None = None) -> ApiError:
    """A 409 for a snapshot of another model, a 400 for bytes that are none; `param` had them."""
    if isinstance(error, SnapshotMismatchError):
        return ApiError(409, str(error), param=param, code="snapshot_mismatch")
    message = f"{error}; send the bytes of an export, or of a returned state, as they came"
    return ApiError(400, message, param=param, code="bad_snapshot")


def unreadable_session(error: SnapshotError) -> ApiError:
    """The response where a stored session's state cannot be used: of another model, or damaged."""
    name = f"session {error.session_id!r}" if error.session_id else "the session"
    if isinstance(error, SnapshotMismatchError):
        return stored_mismatch(error, name, "session_id")
    path = f"/v1/sessions/{error.session_id or 'ID'}"
    advice = (
        f"POST {path}/rewind goes back to the turn before it, where one is stored; DELETE {path}"
        " removes the session"
    )
    return stored_damaged(error, name, advice)


def stored_mismatch(error: SnapshotMismatchError, name: str, param: str) -> ApiError:
    """A 409 for what a server with another model has stored; name: what it is, and its id."""
    message = f"{name} cannot go on here: {error}"
    return ApiError(409, message, param=param, code="snapshot_mismatch")


def stored_damaged(error: SnapshotError, name: str, advice: str) -> ApiError:
    """A 500 for what is stored and whose bytes have changed; the details are logged."""
    logger.error("the stored state of %s is damaged: %s", name, error)
    message = f"the stored state of {name} is damaged, as the server's log says: {advice}"
    return ApiError(500, message, code="session_damaged")

"""Every refusal and failure in one form: `{"error": {"message", "type", "param", "code"}}`.

Owns the form and the statuses. Knows no engine beyond its errors; which exception is answered with
what is `handlers.py`'s.
"""

import json
import logging
import math

from fastapi import Response

from cottention.engine.errors import (
    ContextPolicyError,
    NothingToRewindError,
    SessionBusyError,
    SessionError,
    SessionMovedError,
    SessionNotFoundError,
    SnapshotError,
    StoreFullError,
)

logger = logging.getLogger("cottention")

RETRY_AFTER_SECONDS = 5

SESSION_ERRORS: dict[type[SessionError], tuple[int, str]] = {
    SessionNotFoundError: (404, "session_not_found"),
    SessionBusyError: (409, "session_busy"),
    NothingToRewindError: (409, "nothing_to_rewind"),
    ContextPolicyError: (409, "context_policy_settled"),
    SessionMovedError: (412, "session_moved"),
    StoreFullError: (507, "store_full"),
}
"""The status and the code of what cannot be done with a session."""


INVALID = "invalid_request_error"
KINDS = {429: "rate_limit_error"}
"""What is the client's to change: its `type` by status, where it is not INVALID."""


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
        kind = "server_error" if self.status >= 500 else KINDS.get(self.status, INVALID)
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error})

    def response(self) -> Response:
        """The answer to send."""
        return Response(self.body, self.status, self.headers, media_type="application/json")


def invalid(param: str | None, message: str) -> ApiError:
    """A 400: `param` names the field, `message` says what is allowed."""
    return ApiError(400, message, param=param)


def too_many(message: str, seconds: float, code: str) -> ApiError:
    """A 429 that may be tried again after so many seconds."""
    headers = {"Retry-After": str(max(1, math.ceil(seconds)))}
    return ApiError(429, message, code=code, headers=headers)


def unavailable(message: str) -> ApiError:
    """A 503 that may be tried again, here or elsewhere."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return ApiError(503, message, code="unavailable", headers=headers)


def expired() -> ApiError:
    """A 504 for a request whose time was over before anything was generated."""
    return ApiError(504, "the request's time was over before its first token", code="timeout")


def engine_failed() -> ApiError:
    """A 500 for a request that the engine took and could not finish; the log has the reason."""
    return ApiError(500, "the engine failed on this request; the server's log has the reason")


def of_session(error: SessionError) -> ApiError:
    """What a client is told of a session that cannot do what was asked."""
    status, code = SESSION_ERRORS[type(error)]
    return ApiError(status, str(error), param="session_id", code=code)


def damaged(error: SnapshotError) -> ApiError:
    """A 500 for a stored session whose bytes are not what they were."""
    logger.error("a stored session is damaged: %s", error)
    message = "what was stored of this session is damaged; the server's log has the details"
    return ApiError(500, message, code="session_damaged")

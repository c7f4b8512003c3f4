"""What each key has used, and that none uses more than it may.

Owns the counts of what runs and the tokens of the last minute. Without keys everybody shares one
account. Lives on the event loop.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial

from starlette.types import ASGIApp, Receive, Scope, Send

from cottention.server.generation.output_stream import OutputStream
from cottention.server.generation.request import GenerationRequest
from cottention.server.http.errors import RETRY_AFTER_SECONDS, ApiError, too_many
from cottention.server.limits.key_limits import KeyLimits
from cottention.server.observability.access_log import RequestRecord, request_record

LIMIT_CODE = "rate_limit_exceeded"


class KeyUsage:
    """One key's."""

    def __init__(
        self, name: str, limits: KeyLimits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self.limits = limits
        self._clock = clock
        self._filled_at = clock()
        self._tokens = float(limits.max_tokens_per_minute or 0)
        self._num_running = 0

    def enter(self) -> None:
        """One more request runs. Raises ApiError 429."""
        most = self.limits.max_requests
        if most is not None and self._num_running >= most:
            message = f"this key may have {most} requests at a time"
            raise too_many(message, RETRY_AFTER_SECONDS, LIMIT_CODE)
        per_minute = self.limits.max_tokens_per_minute
        if per_minute is not None:
            self._fill(per_minute)
            if self._tokens <= 0:
                message = f"this key may have {per_minute} tokens a minute"
                seconds = 60 * (1 - self._tokens) / per_minute
                raise too_many(message, seconds, LIMIT_CODE)
        self._num_running += 1

    def leave(self) -> None:
        """A request has ended."""
        self._num_running -= 1

    def charge(self, num_tokens: int) -> None:
        """So many were used; what is overdrawn has to come back before the next request."""
        self._tokens -= num_tokens

    def _fill(self, per_minute: int) -> None:
        now = self._clock()
        gained = (now - self._filled_at) * per_minute / 60
        self._tokens = min(per_minute, self._tokens + gained)
        self._filled_at = now


class RateLimitMiddleware:
    """Middleware that counts what is posted; the rest costs nothing worth counting."""

    def __init__(self, app: ASGIApp, accounts: Mapping[str, KeyUsage]) -> None:
        """By owner, as `Keys` tells them."""
        self._app = app
        self._accounts = accounts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on one request, or refuse it before its body is read."""
        account = None
        if scope["type"] == "http":
            account = self._accounts.get(scope["state"].get("owner", ""))
        if account is None:
            await self._app(scope, receive, send)
            return
        record = request_record(scope)
        scope["state"]["account"], record.key = account, account.name
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            account.enter()
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            record.when_ended(partial(_ended, account, record))


def _ended(account: KeyUsage, record: RequestRecord) -> None:
    account.leave()
    account.charge(record.num_generated)


def limits_of(scope: Scope) -> KeyLimits:
    """What the key of this request may."""
    account: KeyUsage | None = scope["state"].get("account")
    return KeyLimits() if account is None else account.limits


def note(scope: Scope, order: GenerationRequest, reading: OutputStream) -> None:
    """An order of this request runs: its prompts are paid now, its text at the end."""
    request_record(scope).add(order.prompts, reading)
    account: KeyUsage | None = scope["state"].get("account")
    if account is not None:
        account.charge(order.num_prompt_tokens)

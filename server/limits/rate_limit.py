"""Rate limits: concurrent choices and tokens per minute of each API key.

Without keys all clients share one count. Everything here runs on the event loop.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from starlette.types import ASGIApp, Receive, Scope, Send

from cottention.engine.scheduling.client import Client
from cottention.server.generation.output_stream import OutputStream
from cottention.server.generation.request import GenerationRequest
from cottention.server.http.errors import RETRY_AFTER_SECONDS, ApiError, too_many
from cottention.server.limits.key_limits import KeyLimits
from cottention.server.observability.access_log import RequestRecord, request_record

CANCEL = "/cancel"
"""What the paths end with by which a key ends its own requests, however many it has."""

LIMIT_CODE = "rate_limit_exceeded"


class KeyUsage:
    """What one key uses: its running choices, and a bucket of tokens that refills by the minute.

    A request counts once until it is known how many choices it has, and then with all of them.

    A request may overdraw the bucket, since its length is not known before its end; the next one
    has to wait until the bucket is above zero.
    """

    def __init__(
        self,
        name: str,
        limits: KeyLimits,
        clock: Callable[[], float] = time.monotonic,
        weight: int = 1,
    ) -> None:
        """name: of the key, in the log; "" is for all clients of a server without keys.

        weight: its part of the slots, in proportion to those of other keys. num_elsewhere: choices
        that run at other servers and count as well.
        """
        self.name = name
        self.weight = weight
        self.limits = limits
        self._clock = clock
        self._refilled_at = clock()
        self._tokens = float(limits.max_tokens_per_minute or 0)
        self._num_running = 0
        self.num_elsewhere = 0

    async def prepare(self) -> None:
        """Before `enter`: ask whoever counts for other servers as well. Here it is nobody."""

    def enter(self) -> None:
        """A request starts that may generate. Raises ApiError 429."""
        self._check_running(1)
        self._check_tokens()
        self._num_running += 1

    def enter_read(self) -> None:
        """A request starts that only reads, and takes no tokens. Raises ApiError 429."""
        self._check_running(1)
        self._num_running += 1

    def add_choices(self, num_choices: int) -> None:
        """A request that has started has so many choices besides one. Raises ApiError 429."""
        self._check_running(num_choices)
        self._num_running += num_choices

    def leave(self, num_choices: int = 1) -> None:
        """A request has ended."""
        self._num_running -= num_choices

    def charge(self, num_tokens: int) -> None:
        """Take tokens out of the bucket."""
        self._tokens -= num_tokens

    def _check_running(self, num_more: int) -> None:
        limit = self.limits.max_requests
        num_running = self._num_running + self.num_elsewhere
        if limit is not None and num_running + num_more > limit:
            message = (
                f"the limit of concurrent requests for {self._whose} is {limit}, each counted"
                f" prompts times n, and {num_running} are running; retry when one of them"
                " has ended"
            )
            raise too_many(message, RETRY_AFTER_SECONDS, LIMIT_CODE)

    def _check_tokens(self) -> None:
        per_minute = self.limits.max_tokens_per_minute
        if per_minute is not None:
            self._refill(per_minute)
            if self._tokens <= 0:
                raise self._used_up(per_minute, 60 * (1 - self._tokens) / per_minute)

    def _used_up(self, per_minute: int, seconds: float) -> ApiError:
        message = (
            f"the limit of tokens per minute for {self._whose} is {per_minute}, and they"
            " are used up; retry after the seconds in Retry-After"
        )
        return too_many(message, seconds, LIMIT_CODE)

    @property
    def _whose(self) -> str:
        return "this API key" if self.name else "all clients together"

    def _refill(self, per_minute: int) -> None:
        now = self._clock()
        gained = (now - self._refilled_at) * per_minute / 60
        self._tokens = min(per_minute, self._tokens + gained)
        self._refilled_at = now


class RateLimitMiddleware:
    """Counts POST requests and refuses those beyond their key's limits.

    Of other methods, endpoints count those that last (`counting_read`).
    """

    def __init__(self, app: ASGIApp, usage_by_owner: Mapping[str, KeyUsage]) -> None:
        """usage_by_owner: by what `api_keys.owner_id` makes of a key; "" is without keys."""
        self._app = app
        self._usage_by_owner = usage_by_owner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; one that is refused is refused before its body is read."""
        usage = None
        if scope["type"] == "http":
            usage = self._usage_by_owner.get(scope["state"].get("owner", ""))
        if usage is None:
            await self._app(scope, receive, send)
            return
        record = request_record(scope)
        scope["state"]["key_usage"], record.key_name = usage, usage.name
        if scope["method"] != "POST" or scope["path"].endswith(CANCEL):
            await self._app(scope, receive, send)
            return
        try:
            await usage.prepare()
            usage.enter()
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            record.on_end(partial(_release, usage, record))


def _release(usage: KeyUsage, record: RequestRecord) -> None:
    usage.leave(record.num_choices)
    usage.charge(record.num_generated)


@contextlib.contextmanager
def counting_read(scope: Scope) -> Iterator[None]:
    """Count a request that is no POST as one of its key's. Raises ApiError 429."""
    usage: KeyUsage | None = scope["state"].get("key_usage")
    if usage is None:
        yield
        return
    usage.enter_read()
    try:
        yield
    finally:
        usage.leave()


def limits_of(scope: Scope) -> KeyLimits:
    """The limits of this request's key."""
    usage: KeyUsage | None = scope["state"].get("key_usage")
    return KeyLimits() if usage is None else usage.limits


def client_of(scope: Scope) -> Client:
    """The client that a request's key is to the engine."""
    usage: KeyUsage | None = scope["state"].get("key_usage")
    return Client(scope["state"].get("owner", ""), 1 if usage is None else usage.weight)


def count_choices(scope: Scope, request: GenerationRequest) -> None:
    """Count all choices of a generation that is about to begin. Raises ApiError 429."""
    usage: KeyUsage | None = scope["state"].get("key_usage")
    num_choices = len(request.prompts) * request.params.n
    if usage is not None and num_choices > 1:
        usage.add_choices(num_choices - 1)
        request_record(scope).num_choices = num_choices


def track(scope: Scope, request: GenerationRequest, stream: OutputStream) -> None:
    """Record a generation that begins; its key is charged now with what is read for it.

    The generated tokens are charged when the HTTP request has ended.
    """
    request_record(scope).add(request, stream)
    usage: KeyUsage | None = scope["state"].get("key_usage")
    if usage is not None:
        usage.charge(request.num_read_tokens)

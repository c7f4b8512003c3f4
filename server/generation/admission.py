"""The admission queue: bounds on prompts without a first token, and `Retry-After` when it is full.

No API key can fill it for the others: one that has nothing in it may always put a request there.

A full queue refuses a request before its body is tokenized: its tokens are estimated from the
body's length. `Retry-After` follows from the rate at which prompts leave the queue. The queue runs
on the event loop.
"""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator

from cottention.server.config import ServerConfig
from cottention.server.http.errors import RETRY_AFTER_SECONDS, too_many

HORIZON_SECONDS = 30.0
"""Time constant of the rates, in seconds during which the queue was not empty."""

MAX_RETRY_SECONDS = 60.0
INITIAL_BYTES, INITIAL_TOKENS = 4_000.0, 1_000.0
"""The initial estimate of bytes per token, as if a body with these had been measured."""

MAX_MEASURED_TOKENS = 1_000_000
"""Measurements are halved at this many tokens, so that recent bodies count more."""


class Rate:
    """How much leaves the queue per second in which it is not empty, exponentially averaged."""

    def __init__(self) -> None:
        self._seconds = self._amount = 0.0

    def add(self, seconds: float, amount: float) -> None:
        """Account for `amount` that left the queue in the last `seconds`."""
        keep = math.exp(-seconds / HORIZON_SECONDS)
        self._seconds = self._seconds * keep + seconds
        self._amount = self._amount * keep + amount

    def seconds_for(self, amount: float) -> float:
        """Expected seconds until `amount` has left; RETRY_AFTER_SECONDS if nothing ever has."""
        if amount <= 0:
            return 0.0
        if not self._amount:
            return RETRY_AFTER_SECONDS
        return amount * self._seconds / self._amount


class AdmissionQueue:
    """Prompts without a first token, bounded by their number and their tokens."""

    def __init__(
        self,
        max_requests: int,
        max_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._clock = clock
        self._changed_at = clock()
        self._request_rate, self._token_rate = Rate(), Rate()
        self._bytes, self._tokens = INITIAL_BYTES, INITIAL_TOKENS
        self._num_requests_of: Counter[str] = Counter()
        self._num_tokens_of: Counter[str] = Counter()
        self.num_requests = self.num_tokens = self.num_refused = 0

    @classmethod
    def of(cls, config: ServerConfig) -> "AdmissionQueue":
        """A queue with the bounds of the server's settings."""
        return cls(config.max_queued_requests, config.max_queued_tokens)

    def check(self, num_requests: int, num_tokens: int, owner: str = "") -> None:
        """Raise ApiError 429 unless the queue has room.

        owner: of the request's key; "" without keys. Where an owner has nothing in the queue, a
        request of any length is accepted: an empty queue would never have more room. Where others
        have filled it, an owner still has an equal part: together they have at most twice the
        bounds, and one request of any length each.
        """
        excess_requests = self.num_requests + num_requests - self._max_requests
        excess_tokens = self.num_tokens + num_tokens - self._max_tokens
        if not self._num_requests_of[owner] or (excess_requests <= 0 and excess_tokens <= 0):
            return
        if self._is_within_part(num_requests, num_tokens, owner):
            return
        self._pass_time()
        self.num_refused += 1
        seconds = max(
            self._request_rate.seconds_for(excess_requests),
            self._token_rate.seconds_for(excess_tokens),
        )
        message = (
            f"the admission queue is full: {self.num_requests} prompts with {self.num_tokens}"
            " tokens are waiting; try again later"
        )
        raise too_many(message, min(seconds, MAX_RETRY_SECONDS), "queue_full")

    def enter(self, num_requests: int, num_tokens: int, owner: str = "") -> None:
        """Add prompts to the queue. Raises ApiError 429."""
        self.check(num_requests, num_tokens, owner)
        self._pass_time()
        self._num_requests_of[owner] += num_requests
        self._num_tokens_of[owner] += num_tokens
        self.num_requests += num_requests
        self.num_tokens += num_tokens

    def leave(
        self, num_requests: int, num_tokens: int, owner: str = "", *, was_served: bool = False
    ) -> None:
        """Remove prompts from the queue; those that were served determine its rates."""
        self._pass_time()
        self._num_requests_of[owner] -= num_requests
        self._num_tokens_of[owner] -= num_tokens
        self.num_requests -= num_requests
        self.num_tokens -= num_tokens
        if was_served:
            self._request_rate.add(0.0, num_requests)
            self._token_rate.add(0.0, num_tokens)

    @contextlib.contextmanager
    def tokenizing(self, num_bytes: int, owner: str = "") -> Iterator[None]:
        """Hold the place of a body while it is tokenized. Raises ApiError 429."""
        num_tokens = self.estimate_tokens(num_bytes)
        self.enter(1, num_tokens, owner)
        try:
            yield
        finally:
            self.leave(1, num_tokens, owner)

    def estimate_tokens(self, num_bytes: int) -> int:
        """Estimated tokens of a body of `num_bytes`, from earlier bodies."""
        return math.ceil(num_bytes * self._tokens / self._bytes)

    def record_tokens(self, num_bytes: int, num_tokens: int) -> None:
        """Refine the estimate: a body of `num_bytes` had `num_tokens`."""
        self._bytes += num_bytes
        self._tokens += num_tokens
        if self._tokens > MAX_MEASURED_TOKENS:
            self._bytes, self._tokens = self._bytes / 2, self._tokens / 2

    def _is_within_part(self, num_requests: int, num_tokens: int, owner: str) -> bool:
        """Whether an owner would have no more than its equal part, where there are several."""
        num_owners = sum(num > 0 for num in self._num_requests_of.values())
        return (
            num_owners > 1
            and (self._num_requests_of[owner] + num_requests) * num_owners <= self._max_requests
            and (self._num_tokens_of[owner] + num_tokens) * num_owners <= self._max_tokens
        )

    def _pass_time(self) -> None:
        now = self._clock()
        if self.num_requests:
            self._request_rate.add(now - self._changed_at, 0.0)
            self._token_rate.add(now - self._changed_at, 0.0)
        self._changed_at = now

"""What may wait for its first token, and when to come again.

Owns the bounds on prompts and on their tokens, the rate at which both leave the line, and how many
bytes of a body make a token, so that a full line refuses before anything is tokenised. Lives on the
event loop; knows no engine and no endpoint.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from cottention.server.config import ServerConfig
from cottention.server.http.errors import RETRY_AFTER_SECONDS, too_many

HORIZON_SECONDS = 30.0
"""Rates are those of about the last so many seconds in which anybody waited."""

MAX_RETRY_SECONDS = 60.0
FIRST_GUESS = (4_000.0, 1_000.0)
"""Bytes and tokens that are taken for measured before any body has come."""

REMEMBERED_TOKENS = 1_000_000


class Rate:
    """What leaves the line per second in which it is not empty."""

    def __init__(self) -> None:
        self._seconds = self._amount = 0.0

    def add(self, seconds: float, amount: float) -> None:
        """So much has left in so many seconds more."""
        keep = math.exp(-seconds / HORIZON_SECONDS)
        self._seconds = self._seconds * keep + seconds
        self._amount = self._amount * keep + amount

    def seconds_for(self, amount: float) -> float:
        """How long so much will take to leave; a guess where nothing has left yet."""
        if amount <= 0:
            return 0.0
        if not self._amount:
            return RETRY_AFTER_SECONDS
        return amount * self._seconds / self._amount


class AdmissionQueue:
    """Prompts from their arrival to their first token."""

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
        self._bytes, self._tokens = FIRST_GUESS
        self.num_requests = self.num_tokens = self.num_refused = 0

    @classmethod
    def of(cls, config: ServerConfig) -> "AdmissionQueue":
        """The one that a server's settings ask for."""
        return cls(config.max_queued_requests, config.max_queued_tokens)

    def check(self, num_requests: int, num_tokens: int) -> None:
        """Raise ApiError 429 unless so much more may wait.

        Whatever is alone may, however long it is: it would find no better time.
        """
        too_many_requests = self.num_requests + num_requests - self._max_requests
        too_many_tokens = self.num_tokens + num_tokens - self._max_tokens
        if self.num_requests == 0 or (too_many_requests <= 0 and too_many_tokens <= 0):
            return
        self._pass_time()
        self.num_refused += 1
        seconds = max(
            self._request_rate.seconds_for(too_many_requests),
            self._token_rate.seconds_for(too_many_tokens),
        )
        waiting = f"{self.num_requests} prompts of {self.num_tokens} tokens wait"
        message = f"the server is at its limit: {waiting}; try again later"
        raise too_many(message, min(seconds, MAX_RETRY_SECONDS), "queue_full")

    def enter(self, num_requests: int, num_tokens: int) -> None:
        """Begin to wait. Raises ApiError 429."""
        self.check(num_requests, num_tokens)
        self._pass_time()
        self.num_requests += num_requests
        self.num_tokens += num_tokens

    def leave(self, num_requests: int, num_tokens: int, *, was_served: bool = False) -> None:
        """Wait no more; the rates are of those that were served."""
        self._pass_time()
        self.num_requests -= num_requests
        self.num_tokens -= num_tokens
        if was_served:
            self._request_rate.add(0.0, num_requests)
            self._token_rate.add(0.0, num_tokens)

    @contextlib.contextmanager
    def tokenizing(self, num_bytes: int) -> Iterator[None]:
        """Keep the place of a body while it is tokenised. Raises ApiError 429."""
        num_tokens = self.estimate_tokens(num_bytes)
        self.enter(1, num_tokens)
        try:
            yield
        finally:
            self.leave(1, num_tokens)

    def estimate_tokens(self, num_bytes: int) -> int:
        """Tokens of a body of so many bytes, by those that came before."""
        return math.ceil(num_bytes * self._tokens / self._bytes)

    def learn(self, num_bytes: int, num_tokens: int) -> None:
        """A body of so many bytes had so many tokens."""
        self._bytes += num_bytes
        self._tokens += num_tokens
        if self._tokens > REMEMBERED_TOKENS:
            self._bytes, self._tokens = self._bytes / 2, self._tokens / 2

    def _pass_time(self) -> None:
        now = self._clock()
        if self.num_requests:
            self._request_rate.add(now - self._changed_at, 0.0)
            self._token_rate.add(now - self._changed_at, 0.0)
        self._changed_at = now

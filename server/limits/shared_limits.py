"""Limits of keys that hold at all servers of one database together.

Tokens are borrowed from the key's bucket in the database in portions of a second; what a request
took beyond them is paid back from there, at the latest with the next exchange. Running requests are
told and summed by exchanges, so that within one of them each server may let a key have as many as
its limit. While the database cannot be reached each server counts for itself, as one without it
does. Everything here runs on the event loop, but for the questions to the database.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cottention.engine.errors import StoreUnavailableError
from cottention.engine.sessions.store.protocol import KeyLedger
from cottention.server.limits.key_limits import KeyLimits
from cottention.server.limits.rate_limit import KeyUsage

logger = logging.getLogger("cottention")

T = TypeVar("T")

EXCHANGE_SECONDS = 0.4
"""Between two exchanges: as often as a server tells that it lives."""
ANSWER_SECONDS = 1.0
"""How long a request waits for a loan, before it counts as if there were no database."""
NUM_THREADS = 2


class SharedKeyUsage(KeyUsage):
    """What one key uses here; its tokens are what was borrowed and is left, or is owed."""

    def __init__(
        self,
        owner: str,
        name: str,
        limits: KeyLimits,
        ask: "SharedLimits",
        clock: Callable[[], float] = time.monotonic,
        weight: int = 1,
    ) -> None:
        super().__init__(name, limits, clock, weight)
        self.owner = owner
        self._tokens = 0.0
        self._ask = ask
        self._lendable_at = 0.0
        self._borrowing = asyncio.Lock()

    @property
    def num_running(self) -> int:
        """Choices that run here."""
        return self._num_running

    @property
    def is_in_debt(self) -> bool:
        """Whether more was used than was borrowed."""
        return self._tokens < 0

    async def prepare(self) -> None:
        """Borrow tokens for a request, where none are left."""
        if self._tokens <= 0 and self._clock() >= self._lendable_at:
            await self.borrow(seconds=1.0)

    async def borrow(self, *, seconds: float) -> None:
        """Pay what is owed, and take what the key may use in so many seconds.

        Where the database does not answer, each server counts alone from now on.
        """
        per_minute = self.limits.max_tokens_per_minute
        if per_minute is None or not self._ask.is_reachable:
            return
        async with self._borrowing:
            if self._tokens > 0:  # another request has borrowed meanwhile
                return
            owed = -self._tokens
            portion = seconds * max(1.0, per_minute / 60)
            try:
                loan = await self._ask(
                    lambda ledger: ledger.borrow(self.owner, owed, portion, per_minute)
                )
            except (StoreUnavailableError, TimeoutError):
                self._ask.lose()
                return
            self._tokens += owed + loan.lent
            self._lendable_at = self._clock() + (0 if loan.lent else loan.seconds)

    def count_alone(self) -> None:
        """The database is away: from here on the bucket refills by itself."""
        self.num_elsewhere = 0
        self._refilled_at = self._clock()
        self._lendable_at = 0.0
        if self.limits.max_tokens_per_minute is not None:
            self._tokens += max(1.0, self.limits.max_tokens_per_minute / 60)

    def _check_tokens(self) -> None:
        per_minute = self.limits.max_tokens_per_minute
        if not self._ask.is_reachable:
            super()._check_tokens()
        elif per_minute is not None and self._tokens <= 0:
            raise self._used_up(per_minute, max(1.0, self._lendable_at - self._clock()))


class SharedLimits:
    """Asks the ledger, and exchanges with it while the server runs."""

    def __init__(self, ledger: KeyLedger) -> None:
        self._ledger = ledger
        self._threads = ThreadPoolExecutor(NUM_THREADS, "key-limits")
        self._usage: list[SharedKeyUsage] = []
        self.is_reachable = True

    def lose(self) -> None:
        """The database does not answer, until an exchange finds that it does."""
        if self.is_reachable:
            self.is_reachable = False
            for each in self._usage:
                each.count_alone()

    async def __call__(self, question: Callable[[KeyLedger], T]) -> T:
        """Ask in a thread. StoreUnavailableError; TimeoutError: the answer comes too late."""
        loop = asyncio.get_running_loop()
        asked = loop.run_in_executor(self._threads, question, self._ledger)
        return await asyncio.wait_for(asyncio.shield(asked), ANSWER_SECONDS)

    @contextlib.asynccontextmanager
    async def exchanging(self, usage: Mapping[str, KeyUsage]) -> AsyncIterator[None]:
        """Exchange what keys use until the end of the block."""
        self._usage = [each for each in usage.values() if isinstance(each, SharedKeyUsage)]
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        while True:
            try:
                await self._exchange()
                self.is_reachable = True
            except (StoreUnavailableError, TimeoutError):
                self.lose()
            except Exception:
                logger.exception("limits of keys were not exchanged; it is tried again")
            await asyncio.sleep(EXCHANGE_SECONDS)

    async def _exchange(self) -> None:
        running = {
            each.owner: each.num_running
            for each in self._usage
            if each.num_running and each.limits.max_requests is not None
        }
        elsewhere = await self(lambda ledger: ledger.exchange(running))
        for each in self._usage:
            each.num_elsewhere = elsewhere.get(each.owner, 0)
            if each.is_in_debt:
                await each.borrow(seconds=0.0)

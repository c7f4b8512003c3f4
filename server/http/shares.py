"""What is shared out among clients: amounts that each may hold, and turns at work.

Both are by owner (API key), so that the many requests of one do not keep those of another out.
To be used on the event loop only.
"""

import asyncio
import contextlib
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator


class Shares:
    """An amount that owners hold parts of.

    An owner may have more as long as it then holds no more than was free: one alone gets half of
    all, the next one half of the rest.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._held: Counter[str] = Counter()

    @property
    def num_held(self) -> int:
        """What all owners hold."""
        return self._held.total()

    def held_by(self, owner: str) -> int:
        """What one owner holds."""
        return self._held[owner]

    def take(self, owner: str, amount: int) -> bool:
        """Have so much more; False, and nothing changes, where that is too much."""
        if self._held[owner] + amount > self.total - self.num_held:
            return False
        self._held[owner] += amount
        return True

    def give_back(self, owner: str, amount: int) -> None:
        """The opposite of `take`."""
        self._held[owner] -= amount
        if not self._held[owner]:
            del self._held[owner]


class FairTurns:
    """Lets at most `num` pieces of work run at once; those that wait have turns by owner."""

    def __init__(self, num: int) -> None:
        self._num_free = num
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @contextlib.asynccontextmanager
    async def turn(self, owner: str) -> AsyncIterator[None]:
        """Wait for a turn, and have it within the block."""
        if self._num_free and not self._waiting:
            self._num_free -= 1
        else:
            await self._wait(owner)
        try:
            yield
        finally:
            self._num_free += 1
            self._wake()

    async def _wait(self, owner: str) -> None:
        mine = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(mine)
        self._wake()
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():  # it had the turn already
                self._num_free += 1
                self._wake()
            raise

    def _wake(self) -> None:
        """Give the free turns to those who wait: the owner served last comes last."""
        while self._num_free and self._waiting:
            owner, queue = self._waiting.popitem(last=False)
            first = queue.popleft()
            if queue:
                self._waiting[owner] = queue
            if not first.done():
                self._num_free -= 1
                first.set_result(None)

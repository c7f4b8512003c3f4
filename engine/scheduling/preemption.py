"""Requests whose readers are behind: their states wait on the host, and their slots serve others.

Owns the way out of the pool and back into it, how many states there may be outside it, and who has
to end where they are too many. Does not know why a request pauses. A prompt that is still being
read goes on: nothing of it is unread.
"""

import time

from torch import Tensor

from cottention.engine import ops
from cottention.engine.scheduling.request import Choice, Request
from cottention.engine.scheduling.scheduler import Scheduler
from cottention.engine.state.pool import StatePool

Rows = list[tuple[Tensor, ...]]
"""Of the row that a choice runs in, and of its spare where there is one."""


class Preemption:
    """Between a scheduler and a pool; a request that pauses is in no line of the scheduler's."""

    def __init__(self, scheduler: Scheduler, pool: StatePool, max_states: int) -> None:
        """max_states: on the host, of those that pause and of those that wait to go on."""
        self._scheduler = scheduler
        self._pool = pool
        self.max_states = max_states
        self._parked: dict[Request, dict[Choice, Rows]] = {}
        self._paused: dict[Request, None] = {}

    @property
    def num_paused(self) -> int:
        """Requests that wait for their readers."""
        return len(self._paused)

    @property
    def num_states(self) -> int:
        """States on the host; a choice has one."""
        return sum(map(len, list(self._parked.values())))  # `stats` asks from other threads

    def pause(self, request: Request) -> list[Request]:
        """Stop generating; also of one that was to go on and still waits for slots.

        Gives those that have to end for want of room, whose states are gone: others, or itself.
        """
        ended = []
        if self._scheduler.is_running(request):
            ended = self._crowded_out(request)
            for each in ended:
                self.forget(each)
            if request not in ended:
                self._park(request)
        if request in self._parked:
            self._scheduler.remove_request(request)
            self._paused[request] = None
        return ended

    def _crowded_out(self, request: Request) -> list[Request]:
        """Those that have paused longest; it alone, if there is no room for it even so."""
        excess = self.num_states + len(request.unfinished) - self.max_states
        ended = []
        for each in self._paused:
            if excess > 0:
                excess -= len(self._parked[each])
                ended.append(each)
        return [request] if excess > 0 else ended

    def _park(self, request: Request) -> None:
        self._parked[request] = {
            choice: [self._pool.read(row) for row in choice.rows] for choice in request.unfinished
        }
        for choice in request.unfinished:
            self._pool.free(request.slots[choice.index])
        request.slots = []

    def resume(self, request: Request) -> None:
        """Wait for slots, before those that have not begun."""
        if request in self._paused:
            del self._paused[request]
            self._scheduler.add_again(request)

    def begin(self, request: Request) -> bool:
        """Give an admitted request its slots; whether it goes on where it paused."""
        request.slots = [
            ops.PADDING_SLOT if choice.finish_reason else self._pool.allocate()
            for choice in request.choices
        ]
        for choice in request.unfinished:
            choice.rows = self._pool.rows_of(request.slots[choice.index])
        parked = self._parked.pop(request, None)
        if parked is None:
            request.started = time.monotonic()
            return False
        for choice, all_values in parked.items():
            for row, values in zip(choice.rows, all_values, strict=True):
                self._pool.write(row, values)
        self._scheduler.start_choices(request)
        return True

    def forget(self, request: Request) -> None:
        """It ends."""
        self._paused.pop(request, None)
        self._parked.pop(request, None)

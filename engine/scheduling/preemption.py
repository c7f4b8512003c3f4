"""States of paused and preempted requests, parked on the host so that their slots serve others."""

from cottention.engine.scheduling.request import Choice, Request, RequestStatus
from cottention.engine.state.pool import StatePool
from cottention.engine.state.state_copy import StateCopy

_Rows = list[StateCopy]
"""Copies of a choice's rows: the one in use, then the spare row where there is one."""


class Preemption:
    """Parks and resumes the states of requests.

    How many are parked for other clients is limited by the scheduler, which preempts.
    """

    def __init__(self, pool: StatePool, max_states: int) -> None:
        """max_states: limit of states parked for slow readers, a choice having one."""
        self._pool = pool
        self.max_states = max_states
        self._parked: dict[Request, dict[Choice, _Rows]] = {}

    @property
    def num_paused(self) -> int:
        """Paused requests; those that were resumed and still wait for slots do not count."""
        parked = list(self._parked)  # one operation: `stats` is called from other threads
        return sum(request.status is RequestStatus.PAUSED for request in parked)

    @property
    def num_states(self) -> int:
        """States parked for slow readers, also while they wait for slots after they were read."""
        parked = list(self._parked.items())
        return sum(len(states) for request, states in parked if not request.is_preempted)

    @property
    def num_preempted_states(self) -> int:
        """States parked because their slots were another client's turn."""
        parked = list(self._parked.items())
        return sum(len(states) for request, states in parked if request.is_preempted)

    def victims(self, request: Request) -> list[Request]:
        """Requests that have to end before this one can be parked.

        The paused ones that were parked first; or only the request itself, if even ending all
        paused ones leaves no room. Requests that wait to go on are never ended.
        """
        if request in self._parked and not request.is_preempted:
            return []
        excess = self.num_states + len(request.unfinished_choices) - self.max_states
        victims = []
        for each, states in self._parked.items():
            if excess > 0 and each.status is RequestStatus.PAUSED:
                excess -= len(states)
                victims.append(each)
        return [request] if excess > 0 else victims

    def park(self, request: Request) -> None:
        """Copy a running request's states to the host and free its slots.

        A request that is parked already becomes the one parked last.
        """
        states = self._parked.pop(request, None)
        self._parked[request] = self._take_out(request) if states is None else states

    def _take_out(self, request: Request) -> dict[Choice, _Rows]:
        states = {
            choice: [self._pool.read(row) for row in choice.rows]
            for choice in request.unfinished_choices
        }
        for choice in states:
            assert choice.slot is not None, "only a running request has states in the pool"
            self._pool.free(choice.slot)
            choice.slot = None
        return states

    def resume(self, request: Request) -> bool:
        """Copy parked states into the request's new slots; False where none are parked."""
        states = self._parked.pop(request, None)
        if states is None:
            return False
        for choice, rows in states.items():
            for row, values in zip(choice.rows, rows, strict=True):
                self._pool.write(row, values)
        return True

    def discard(self, request: Request) -> None:
        """Forget the states of a request that has ended, if any are parked."""
        self._parked.pop(request, None)

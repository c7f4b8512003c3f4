"""Requests that wait for slots: a queue for each client, and whose turn it is among the clients.

Clients share the engine's time by weighted fair queueing: each has a virtual time, which grows by
its part of every step, divided by its weight, and the client with the least is served next (the
virtual token counter of arXiv 2401.00588, counting slots in place of tokens). A client that begins
to wait owes no more than QUANTUM steps, and one that holds slots has saved up no more than MAX_LAG.

A client whose requests need up to m slots each waits for at most (QUANTUM + MAX_LAG) · m · W steps
without any slot, where W is the sum of all clients' weights, as long as the states of preempted
requests may be parked. For its virtual time t stands still meanwhile, and whoever is at t + QUANTUM
gives it slots. After each step without success the others, those behind t + QUANTUM, hold 1/m of
the slots or more, and so their distances from there, times their weights, fall by 1/m together.
Each of these was at most QUANTUM + MAX_LAG. The scheduler's simulation tests it.
"""

import bisect
import math
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from cottention.engine.scheduling.client import Client

MAX_OVERTAKES = 64
"""How many later or more important requests of its client may start before a waiting one."""

QUANTUM = 16.0
"""Steps by which a client's virtual time must exceed another's before that one takes its slots."""

MAX_LAG = 2 * QUANTUM
"""Steps by which the virtual time of a client that holds slots may be behind that of any other."""


class Queued(Protocol):
    """A request that may wait. num_slots: that it needs, or holds. Lower `priority` goes first."""

    @property
    def client(self) -> Client: ...
    @property
    def priority(self) -> int: ...
    @property
    def is_preempted(self) -> bool: ...
    @property
    def num_slots(self) -> int: ...


Waiting = TypeVar("Waiting", bound=Queued)


class ClientQueue(Generic[Waiting]):
    """The waiting requests of one client: preempted ones, the most important, then the oldest.

    While preempted ones wait nothing else of the client starts, so that a client never has begun
    more than there are slots.
    """

    def __init__(self) -> None:
        self._preempted: deque[Waiting] = deque()
        self._requests: list[Waiting] = []
        self._num_admitted_before: dict[Waiting, int] = {}
        self._num_admitted = 0

    def __len__(self) -> int:
        return len(self._preempted) + len(self._requests)

    def add_preempted(self, request: Waiting) -> None:
        """Queue a request before all others; it has not been overtaken by those that start."""
        self._preempted.appendleft(request)

    def add(self, request: Waiting, *, is_first: bool) -> None:
        """Queue a request before or after all others of its priority."""
        insort = bisect.insort_left if is_first else bisect.insort_right
        insort(self._requests, request, key=_priority)
        self._num_admitted_before[request] = self._num_admitted

    def next(self) -> Waiting:
        """The first request, or the oldest if too many have overtaken it."""
        if self._preempted:
            return self._preempted[0]
        oldest, before = next(iter(self._num_admitted_before.items()))
        return oldest if self._num_admitted - before >= MAX_OVERTAKES else self._requests[0]

    def admit(self, request: Waiting) -> None:
        """Take out a request that starts."""
        self._num_admitted += not request.is_preempted
        self.remove(request)

    def remove(self, request: Waiting) -> bool:
        """Take out a request if it is there; whether it was."""
        if request.is_preempted:
            self._preempted.remove(request)
            return True
        if self._num_admitted_before.pop(request, None) is None:
            return False
        self._requests.remove(request)
        return True


@dataclass(slots=True)
class _Share(Generic[Waiting]):
    """What one client waits for, has, and has had.

    time: virtual time, in steps. num_slots: that its requests hold now.
    """

    queue: ClientQueue[Waiting] = field(default_factory=ClientQueue)
    time: float = -math.inf
    num_slots: int = 0
    weight: int = 1


class FairQueue(Generic[Waiting]):
    """The queues of all clients, and the slots that each holds."""

    def __init__(self) -> None:
        self._shares: dict[str, _Share[Waiting]] = {}
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def add(self, request: Waiting, *, is_first: bool = False) -> None:
        """Queue a request, before or after all others of its client and priority.

        A preempted one goes before all others of its client.
        """
        share = self._shares.setdefault(request.client.id, _Share())
        share.weight = request.client.weight
        if not share.queue:
            self._limit_time(share)
        if request.is_preempted:
            share.queue.add_preempted(request)
        else:
            share.queue.add(request, is_first=is_first)
        self._num_waiting += 1

    def next(self, excluded: Collection[Client] = ()) -> Waiting | None:
        """The next request of the client that has had least, among those that are not excluded."""
        ids = {client.id for client in excluded}
        waiting = [each for key, each in self._shares.items() if each.queue and key not in ids]
        return min(waiting, key=_turn).queue.next() if waiting else None

    def admit(self, request: Waiting) -> None:
        """A waiting request gets its slots."""
        share = self._shares[request.client.id]
        share.queue.admit(request)
        share.num_slots += request.num_slots
        self._num_waiting -= 1

    def remove(self, request: Waiting) -> None:
        """Remove a request if it waits."""
        share = self._shares.get(request.client.id)
        if share is not None and share.queue.remove(request):
            self._num_waiting -= 1
            self._drop_shares()

    def free(self, client: Client, num_slots: int) -> None:
        """Requests of a client have given up slots."""
        self._shares[client.id].num_slots -= num_slots
        self._drop_shares()

    def charge_step(self) -> None:
        """Divide a step among the clients that hold slots, in proportion to these.

        Slots that are empty are charged to them as well: others may be waiting for them.
        """
        if len(self._shares) > 1:
            total = sum(share.num_slots for share in self._shares.values())
            least = max(share.time for share in self._shares.values()) - MAX_LAG
            for share in self._shares.values():
                if share.num_slots:
                    share.time = max(share.time, least)
                    share.time += share.num_slots / (total * share.weight)

    def charge(self, client: Client, num_steps: float) -> None:
        """A client has had so much time by itself."""
        share = self._shares[client.id]
        share.time += num_steps / share.weight

    def least_served(self, running: Iterable[Waiting]) -> Waiting:
        """The first request of the client that has had least, of some that hold slots."""
        return min(running, key=lambda each: self._shares[each.client.id].time)

    def is_owed(self, request: Waiting) -> bool:
        """Whether any client has to give slots to a waiting request."""
        mine = self._shares[request.client.id]
        return any(
            _owes(each, each.num_slots, mine) for each in self._shares.values() if each is not mine
        )

    def victims(
        self, request: Waiting, num_missing: int, running: Iterable[Waiting]
    ) -> list[Waiting]:
        """Running requests that have to give up as many slots for a waiting one; none if too few.

        First those of the client that has had most, and the least important of these.
        """
        mine, victims = self._shares[request.client.id], []
        num_slots = {key: share.num_slots for key, share in self._shares.items()}

        def order(each: Waiting) -> tuple[float, int]:
            return -self._shares[each.client.id].time, -each.priority

        for each in sorted(running, key=order):
            key = each.client.id
            if num_missing > 0 and _owes(self._shares[key], num_slots[key], mine):
                victims.append(each)
                num_missing -= each.num_slots
                num_slots[key] -= each.num_slots
        return victims if num_missing <= 0 else []

    def _limit_time(self, mine: _Share[Waiting]) -> None:
        """Bound what a client that begins to wait is owed, and what it owes.

        It is owed slots of the client that has had most, but comes after those that wait for them;
        it may have had a quantum more than the others.
        """
        others = [each for each in self._shares.values() if each is not mine]
        waiting = [each.time for each in others if each.queue]
        running = [each.time for each in others if each.num_slots]
        most = max(running, default=0.0)
        mine.time = max(mine.time, min([*waiting, most - QUANTUM]))
        if waiting or running:
            mine.time = min(mine.time, max([*waiting, *running]) + QUANTUM)

    def _drop_shares(self) -> None:
        """Forget what clients have had once no client waits or runs: nobody is owed anything."""
        if not any(share.queue or share.num_slots for share in self._shares.values()):
            self._shares.clear()


def _owes(share: _Share[Waiting], num_slots: int, mine: _Share[Waiting]) -> bool:
    """Whether a client that holds so many slots has to give some to another.

    It is ahead by a quantum, and holds more for its weight.
    """
    holds_more = num_slots * mine.weight > mine.num_slots * share.weight
    return holds_more and share.time - mine.time >= QUANTUM


def _priority(request: Queued) -> int:
    return request.priority


def _turn(share: _Share[Waiting]) -> tuple[float, float]:
    """By virtual time; of equal ones those that hold less go first."""
    return share.time, share.num_slots / share.weight

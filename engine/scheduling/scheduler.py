"""Who runs in the next step, under one token budget. Knows no torch.

Running choices come first, one token each, or two where the state after the next renewal grows in
the spare row beside; prompts take of what is left as much as those that run can bear, the shortest
first, so that none waits behind a long one. Nobody starves: running choices take turns, the prompt
that has been read longest has a share of every step, and one that waits is overtaken by so many
others and no more.
"""

import bisect
from collections import deque
from collections.abc import MutableSequence

from cottention.engine.scheduling.batch import Batch, LookaheadRow, PrefillChunk, stop_of
from cottention.engine.scheduling.request import Choice, Request

_PROMPT_SHARE = 4
"""Prompts get at least a fourth of the budget, and the oldest a fourth of what prompts get."""

_MIN_BESIDE = 16
"""Prompt tokens of a step beside few running choices: fewer would cost as much."""

PATIENCE = 64
"""How many later or more important requests may start before one that waits."""


class Scheduler:
    """Three lines: requests that wait for slots, prompts being read, choices being continued.

    A request whose reader is behind is in none of them.
    """

    def __init__(self, max_batch_tokens: int, max_beside: int | None = None) -> None:
        """max_beside: most prompt tokens of a step with running choices; None: as many as run."""
        self._budget = max_batch_tokens
        self._max_beside = max_beside
        self._waiting: list[Request] = []
        self._entered: dict[Request, int] = {}
        self._num_admitted = 0
        self._reading: deque[Request] = deque()
        self._running: deque[Choice] = deque()

    @property
    def num_waiting(self) -> int:
        """Requests without slots."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests with slots."""
        running = list(self._running)  # one operation: `stats` asks from other threads
        return len(self._reading) + len({choice.request for choice in running})

    def has_work(self) -> bool:
        """Whether anything waits, is read or runs."""
        return bool(self._waiting or self._reading or self._running)

    def add(self, request: Request) -> None:
        """Put a new request into the line: behind all of its priority."""
        bisect.insort_right(self._waiting, request, key=_priority)
        self._entered[request] = self._num_admitted

    def add_again(self, request: Request) -> None:
        """Put one that had slots into the line: before all of its priority."""
        bisect.insort_left(self._waiting, request, key=_priority)
        self._entered[request] = self._num_admitted

    def admit(self, num_free_slots: int) -> list[Request]:
        """Requests that may start now; each needs a slot for each unfinished choice."""
        admitted: list[Request] = []
        while self._waiting and len((request := self._next()).unfinished) <= num_free_slots:
            self._waiting.remove(request)
            del self._entered[request]
            self._num_admitted += 1
            num_free_slots -= len(request.unfinished)
            self._reading.append(request)
            admitted.append(request)
        return admitted

    def _next(self) -> Request:
        """First in the line, but for one that too many have overtaken."""
        longest, entered = next(iter(self._entered.items()))
        return longest if self._num_admitted - entered >= PATIENCE else self._waiting[0]

    def schedule(self) -> Batch:
        """The next step. Whoever does not fit into the budget is first in the step after it."""
        reserved = max(1, self._budget // _PROMPT_SHARE) if self._reading else 0
        decode, ahead = self._continued(max(1, self._budget - reserved))
        self._running.rotate(-len(decode))
        chunks = self._chunks(self._budget_beside(len(decode) + len(ahead)))
        return Batch(decode, chunks, ahead)

    def _continued(self, budget: int) -> tuple[list[Choice], list[LookaheadRow]]:
        """Running choices that fit, the first in any case, and those of them with spare rows."""
        decode: list[Choice] = []
        ahead: list[LookaheadRow] = []
        for choice in self._running:
            start = choice.ahead
            spent = len(decode) + len(ahead) + (1 if start is None else 2)
            if decode and spent > budget:
                break
            decode.append(choice)
            if start is not None:
                ahead.append(LookaheadRow(choice, start))
        return decode, ahead

    def _budget_beside(self, num_decode: int) -> int:
        """What prompts may have, so that they hold up those that run by a step's length at most."""
        left = self._budget - num_decode
        if not num_decode:
            return left
        most = self._max_beside
        return min(left, max(_MIN_BESIDE, num_decode) if most is None else most)

    def _chunks(self, budget: int) -> list[PrefillChunk]:
        """Those with the least to read come first; the oldest has its share in any case."""
        chunks = []
        oldest = self._reading[0] if self._reading else None
        kept = max(1, budget // _PROMPT_SHARE)
        for request in sorted(self._reading, key=_num_unread):
            if request is oldest:
                kept = 0
            if budget > kept:
                start = request.num_read
                stop = stop_of(request, start + budget - kept)
                budget -= stop - start
                chunks.append(PrefillChunk(request, request.reads[0], start, stop))
        return chunks

    def start_choices(self, request: Request) -> None:
        """The prompt has been read: its choices run from the next step on."""
        self._reading.remove(request)
        self._running.extend(request.unfinished)

    def remove_choice(self, choice: Choice) -> None:
        """A running choice has ended."""
        self._running.remove(choice)

    def is_running(self, request: Request) -> bool:
        """Whether its prompt has been read, and it has slots."""
        return any(choice.request is request for choice in self._running)

    def remove_request(self, request: Request) -> None:
        """Take a request out of wherever it is."""
        self._entered.pop(request, None)
        lines: tuple[MutableSequence[Request], ...] = (self._waiting, self._reading)
        for line in lines:
            if request in line:
                line.remove(request)
        for choice in [choice for choice in self._running if choice.request is request]:
            self._running.remove(choice)


def _priority(request: Request) -> int:
    return request.priority


def _num_unread(request: Request) -> int:
    return request.stop - request.num_read

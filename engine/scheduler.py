"""Who runs in the next step, under one token budget. Knows no torch.

Running choices come first, one token each, or two where the state after the next renewal grows in
the spare row beside; prompts take what is left, in the order of arrival, and
at least a share of the budget, so that neither can starve the other.
"""

import bisect
from collections import deque
from collections.abc import MutableSequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.choice import Choice
from engine.prefix_cache import BLOCK
from engine.reads import Read
from engine.request import Request

_PROMPT_SHARE = 4
"""Prompts that wait get at least a fourth of the budget."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Ids start:stop of a request, to be read in one step."""

    request: Request
    read: Read
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether the prompt is complete with it."""
        return self.stop == self.request.stop and not self.read.is_spare

    @property
    def row(self) -> int:
        """Where they go."""
        first = self.request.choices[0]
        return first.spare if self.read.is_spare else first.row


class Ahead(NamedTuple):
    """A choice whose next id goes into its spare row, too, and the context that row begins with."""

    choice: Choice
    start: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One step's work: choices that take one token each, chunks of prompts, and spare rows."""

    decode: list[Choice]
    prefill: list[Chunk]
    ahead: list[Ahead] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)

    @property
    def requests(self) -> list[Request]:
        """Everyone with work in this step, once."""
        everyone = [choice.request for choice in self.decode]
        return list(dict.fromkeys(everyone + [chunk.request for chunk in self.prefill]))


def _stop(request: Request, most: int) -> int:
    """Where a chunk ends: of a prompt whose state may be reused, at a whole block if it can."""
    read = request.reads[0]
    end = min(read.stop, most)
    if request.prefix is None or read.is_spare:
        return end
    whole = min(end, read.stop - 1) // BLOCK * BLOCK
    return whole if whole > request.num_read else end


class Scheduler:
    """Three lines: requests that wait for slots, prompts being read, choices being continued."""

    def __init__(self, max_batch_tokens: int) -> None:
        self._budget = max_batch_tokens
        self._waiting: list[Request] = []
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
        bisect.insort_right(self._waiting, request, key=lambda waiting: waiting.priority)

    def admit(self, num_free_slots: int) -> list[Request]:
        """Requests that may start now, first come first served; each needs a slot per choice."""
        admitted = []
        while self._waiting and len(self._waiting[0].choices) <= num_free_slots:
            request = self._waiting.pop(0)
            num_free_slots -= len(request.choices)
            self._reading.append(request)
            admitted.append(request)
        return admitted

    def schedule(self) -> Plan:
        """The next step. Whoever does not fit into the budget is first in the step after it."""
        reserved = max(1, self._budget // _PROMPT_SHARE) if self._reading else 0
        decode, ahead = self._continued(max(1, self._budget - reserved))
        self._running.rotate(-len(decode))
        chunks = self._chunks(self._budget - len(decode) - len(ahead))
        return Plan(decode, chunks, ahead)

    def _continued(self, budget: int) -> tuple[list[Choice], list[Ahead]]:
        """Running choices that fit, the first in any case, and those of them with spare rows."""
        decode: list[Choice] = []
        ahead: list[Ahead] = []
        for choice in self._running:
            start = choice.ahead
            spent = len(decode) + len(ahead) + (1 if start is None else 2)
            if decode and spent > budget:
                break
            decode.append(choice)
            if start is not None:
                ahead.append(Ahead(choice, start))
        return decode, ahead

    def _chunks(self, budget: int) -> list[Chunk]:
        chunks = []
        for request in self._reading:
            if budget <= 0:
                break
            start = request.num_read
            stop = _stop(request, start + budget)
            budget -= stop - start
            chunks.append(Chunk(request, request.reads[0], start, stop))
        return chunks

    def start_choices(self, request: Request) -> None:
        """The prompt has been read: its choices run from the next step on."""
        self._reading.remove(request)
        self._running.extend(request.choices)

    def remove_choice(self, choice: Choice) -> None:
        """A running choice has ended."""
        self._running.remove(choice)

    def remove_request(self, request: Request) -> None:
        """Take a request out of wherever it is."""
        lines: tuple[MutableSequence[Request], ...] = (self._waiting, self._reading)
        for line in lines:
            if request in line:
                line.remove(request)
        for choice in [choice for choice in self._running if choice.request is request]:
            self._running.remove(choice)

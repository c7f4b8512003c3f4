"""Masks of the next ids, computed in threads beside the engine's while that runs the model.

`MaskWorker` is told which ids were sampled, and has the next masks ready when the next ids are to
be sampled. A grammar can be so heavy that one of its masks takes longer than a step. Where several
clients share the steps, what one of them asks for does not hold up the others:

- a step waits at most MAX_WAIT for masks; rows without one are sampled in a later step;
- the time that the masks of a client take is counted. Above MASK_SHARE of the time they are
  computed in a thread of low priority, after those of others, and no step waits for them.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cottention.engine.grammar.matcher import MaskResult, Matcher, num_words

_log = logging.getLogger(__name__)

MASK_THREADS_PER_CPU = 4
"""A thread for masks beside four of the model's: masks take a small part of a step."""

MAX_WAIT = 0.005
"""Seconds that a step of several clients waits for masks."""

MASK_SHARE = 1 / 8
"""Share of the time that the masks of one client may take before those of others."""

MAX_DEBT = 0.05
"""Seconds of work beyond that share: most masks are short, and the first ones long."""

CALL_SECONDS = 0.005
MAX_CALL_ROWS = 16
LONE_CALL_SECONDS = 0.1
"""A call computes so many rows that it takes about these seconds, by what others have taken: those
of a client alone are long, since each call costs a change of threads."""

FIRST_ROW_SECONDS = 0.001
"""What a row is expected to take before any of its client was measured."""

ESTIMATE_DECAY = 0.9
"""Of what a row is expected to take, for each call that took less."""

MAX_ACCOUNTS = 1024
"""Clients whose work is remembered, besides those that have more than their share."""

LOW_PRIORITY = 10
"""Niceness of the thread for clients that have more than their share, above that of others."""


class SampledRow(NamedTuple):
    """An id that was sampled for a choice of a client, and the choice's matcher."""

    client: Hashable
    matcher: Matcher
    token_id: int


class MaskWorker:
    """The threads that advance matchers. They start with the first of them."""

    def __init__(self, num_ids: int) -> None:
        self._num_words = num_words(num_ids)
        self._accounts = MaskAccounts()
        self._is_shared = False
        self._lanes: tuple[_Lane, _Lane] | None = None

    def advance(self, sampled: Sequence[SampledRow], *, is_shared: bool) -> None:
        """Begin to advance each matcher by the id that was sampled for it.

        is_shared: whether requests of several clients run.
        """
        self._is_shared = is_shared
        if not sampled:
            return
        if self._lanes is None:
            num_threads = max(1, (os.cpu_count() or 1) // MASK_THREADS_PER_CPU)
            self._lanes = _Lane("masks", num_threads), _Lane("late-masks", 1, LOW_PRIORITY)
        by_client: dict[Hashable, list[SampledRow]] = {}
        for row in sampled:
            by_client.setdefault(row.client, []).append(row)
        for client, rows in by_client.items():
            size = self._accounts.num_call_rows(client, is_shared=is_shared)
            for start in range(0, len(rows), size):
                self._submit(client, rows[start : start + size], self._lanes)

    def wait(
        self, rows: Sequence[tuple[Hashable, Matcher]], is_shared: Callable[[], bool]
    ) -> list[int]:
        """Wait for the masks of one client until they are there, for those of several MAX_WAIT.

        rows: client and matcher of each. For masks that have more than their share it does not
        wait. Returns the places of the rows whose masks are not there.
        """
        places: dict[Future[MaskResult] | None, list[int]] = {}
        for place, (_, matcher) in enumerate(rows):
            places.setdefault(matcher.pending, []).append(place)
        pending = [each for each in places if each is not None and not each.done()]
        if not pending:
            return []
        self._is_shared = is_shared()
        if self._is_shared:
            above = self._accounts.is_above_share
            wait([each for each in pending if not above(rows[places[each][0]][0])], MAX_WAIT)
        else:
            wait(pending)
        done = {each: each is None or each.done() for each in places}  # asked once: threads work
        return [place for each, group in places.items() if not done[each] for place in group]

    def close(self) -> None:
        """End the threads when they have done what they are at."""
        for lane in self._lanes or ():
            lane.close()
        self._lanes = None

    def _submit(
        self, client: Hashable, rows: Sequence[SampledRow], lanes: "tuple[_Lane, _Lane]"
    ) -> None:
        result: Future[MaskResult] = Future()
        for place, row in enumerate(rows):
            row.matcher.await_mask(result, place)
        first, last = lanes

        def compute(lane: _Lane) -> None:
            if lane is first and self._is_late(client):  # by what was computed in the meantime
                last.submit(lambda: compute(last))
                return
            if all(row.matcher.is_closed for row in rows):
                return
            start = time.perf_counter()
            found = _masks(lane.executor, rows, self._num_words)
            seconds = time.perf_counter() - start
            self._accounts.note(client, len(rows), seconds)
            if lane is first and self._is_shared:
                self._accounts.charge(client, seconds)
            result.set_result(found)

        first.submit(lambda: compute(first))

    def _is_late(self, client: Hashable) -> bool:
        return self._is_shared and self._accounts.is_above_share(client)


def wait_for_one(matchers: Sequence[Matcher], seconds: float) -> None:
    """Wait until one of these has its mask, or for so long."""
    pending = [each.pending for each in matchers]
    wait([each for each in pending if each], seconds, FIRST_COMPLETED)


def _masks(executor: Any, rows: Sequence[SampledRow], num_words: int) -> MaskResult:
    """Two calls for all rows, which run without the interpreter's lock."""
    masks = torch.zeros(len(rows), num_words, dtype=torch.int32)
    places = [(row.matcher.native, place) for place, row in enumerate(rows)]
    try:
        executor.consume_token_par([(row.matcher.native, row.token_id) for row in rows])
        executor.unsafe_compute_mask_ptr(places, masks.data_ptr(), 4 * num_words, len(rows))
    except Exception as error:  # whoever waits for the masks must hear of it
        _log.exception("failed to compute masks; the requests end with an error")
        return MaskResult(masks.zero_(), dict.fromkeys(range(len(rows)), type(error).__name__))
    errors = {place: str(native.get_error()) for native, place in places if native.is_error()}
    if errors:
        masks[[*errors]] = 0
    return MaskResult(masks, errors)


class _Lane:
    """A thread that computes masks one call after the other; the library's threads are below it."""

    def __init__(self, name: str, num_threads: int, niceness: int = 0) -> None:
        self._thread = ThreadPoolExecutor(1, name, self._begin, (num_threads, niceness))
        self.executor: Any = None

    def _begin(self, num_threads: int, niceness: int) -> None:
        from llguidance import LLExecutor

        if niceness and sys.platform == "linux":  # elsewhere it would be that of the whole process
            thread = threading.get_native_id()
            own = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, own + niceness)
        self.executor = LLExecutor(num_threads)  # its threads inherit the priority

    def submit(self, work: Callable[[], None]) -> None:
        self._thread.submit(work)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


@dataclass(slots=True)
class _Account:
    """What is known of a client's masks.

    debt: seconds of work above the share, when it was `counted`. row_seconds: what a row takes.
    """

    debt: float = 0.0
    counted: float = 0.0
    row_seconds: float = FIRST_ROW_SECONDS


class MaskAccounts:
    """How much time the masks of each client take. May be used from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._accounts: dict[Hashable, _Account] = {}

    def is_above_share(self, client: Hashable) -> bool:
        """Whether its masks have taken more than MASK_SHARE of the time, and MAX_DEBT."""
        with self._lock:
            return self._debt(client) > MAX_DEBT

    def charge(self, client: Hashable, seconds: float) -> None:
        """Count work that was done before that of others."""
        with self._lock:
            debt = self._debt(client) + seconds
            account = self._account(client)
            account.debt, account.counted = debt, self._clock()

    def note(self, client: Hashable, num_rows: int, seconds: float) -> None:
        """Learn from a call what a row takes."""
        with self._lock:
            account = self._account(client)
            known = ESTIMATE_DECAY * account.row_seconds
            account.row_seconds = max(seconds / num_rows, known)

    def num_call_rows(self, client: Hashable, *, is_shared: bool) -> int:
        """Rows of the client's next call. is_shared: whether it may hold up others."""
        with self._lock:
            account = self._accounts.get(client) or _Account()
        if not is_shared:
            return max(1, int(LONE_CALL_SECONDS / account.row_seconds))
        return min(MAX_CALL_ROWS, max(1, int(CALL_SECONDS / account.row_seconds)))

    def _debt(self, client: Hashable) -> float:
        account = self._accounts.get(client)
        if account is None or not account.debt:
            return 0.0
        return max(0.0, account.debt - MASK_SHARE * (self._clock() - account.counted))

    def _account(self, client: Hashable) -> _Account:
        if client not in self._accounts and len(self._accounts) >= MAX_ACCOUNTS:
            self._accounts = {c: a for c, a in self._accounts.items() if self._debt(c)}
        return self._accounts.setdefault(client, _Account())

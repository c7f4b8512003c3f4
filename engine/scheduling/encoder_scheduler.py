"""Which texts an encoder reads next: a batch of short ones, and a part of a long one.

A text of up to `max_batch_tokens` is short: it is read in one step, together with others. A longer
one is read over many steps, in which its stream stays in memory; long texts take turns.
"""

import itertools
from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from cottention.engine.encoding import EncodeParams


@dataclass(slots=True, eq=False)
class EncodeRequest:
    """A text and what is asked of it.

    slot: of the pool, while it is read. started: when it first had a slot, by time.monotonic.
    """

    id: str
    ids: Sequence[int]
    params: EncodeParams
    priority: int = 0
    number: int = field(default_factory=itertools.count().__next__)
    slot: int | None = None
    started: float | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Lower priority first, then by arrival."""
        return self.priority, self.number


class EncoderScheduler:
    """Waiting and running texts, under a budget of tokens a step and one of tokens in memory."""

    def __init__(self, max_batch_tokens: int, max_long_tokens: int) -> None:
        """max_long_tokens: of the long texts that are in memory together."""
        self._max_batch_tokens = max_batch_tokens
        self.max_long_tokens = max_long_tokens
        self._short: list[EncodeRequest] = []
        self._long: list[EncodeRequest] = []
        self._running: deque[EncodeRequest] = deque()

    @property
    def num_waiting(self) -> int:
        """Texts that nothing has been computed of."""
        return len(self._short) + len(self._long)

    @property
    def num_running(self) -> int:
        """Long texts that are in memory."""
        return len(self._running)

    @property
    def num_long_tokens(self) -> int:
        """Their tokens."""
        return sum(len(request.ids) for request in self._running)

    def has_work(self) -> bool:
        """Whether there is any text."""
        return bool(self._short or self._long or self._running)

    def is_long(self, num_tokens: int) -> bool:
        """Whether a text of this length is read over several steps."""
        return num_tokens > self._max_batch_tokens

    def add(self, request: EncodeRequest) -> None:
        """Add a text. A long one must fit into memory by itself."""
        is_long = self.is_long(len(request.ids))
        insort(self._long if is_long else self._short, request, key=lambda each: each.order)

    def remove(self, request: EncodeRequest) -> None:
        """Forget a text, wherever it is."""
        for requests in (self._short, self._long, self._running):
            if request in requests:
                requests.remove(request)

    def take_short(self, num_slots: int) -> list[EncodeRequest]:
        """Waiting short texts that one step reads together; they are not kept."""
        batch: list[EncodeRequest] = []
        num_tokens = 0
        for request in self._short[:num_slots]:
            num_tokens += len(request.ids)
            if num_tokens > self._max_batch_tokens:
                break
            batch.append(request)
        del self._short[: len(batch)]
        return batch

    def admit_long(self, num_slots: int) -> list[EncodeRequest]:
        """Waiting long texts for which there are slots and memory; they run from now on."""
        admitted: list[EncodeRequest] = []
        while self._long and len(admitted) < num_slots:
            num_tokens = self.num_long_tokens + len(self._long[0].ids)
            if num_tokens > self.max_long_tokens:
                break
            request = self._long.pop(0)
            self._running.append(request)
            admitted.append(request)
        return admitted

    def next_long(self) -> EncodeRequest | None:
        """The running long text whose turn it is."""
        if not self._running:
            return None
        self._running.rotate(-1)
        return self._running[-1]

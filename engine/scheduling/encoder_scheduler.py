"""Which texts an encoder reads next: a batch of short ones, and a part of a long one.

A text of up to `max_batch_tokens` is short: it is read in one step, together with others. A longer
one is read over many steps, in which its stream stays in memory; long texts take turns. Clients
share both by weighted fair queueing, counted in tokens of short texts and in parts of long ones.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from cottention.engine.encoding import EncodeParams
from cottention.engine.scheduling.client import DEFAULT_CLIENT, Client
from cottention.engine.scheduling.fair_queue import FairQueue


@dataclass(slots=True, eq=False)
class EncodeRequest:
    """A text and what is asked of it.

    client: on whose behalf; lower `priority` starts first among the client's own. slot: of the
    pool, while it is read. started: when it first had a slot, by time.monotonic.
    """

    id: str
    ids: Sequence[int]
    params: EncodeParams
    priority: int = 0
    client: Client = DEFAULT_CLIENT
    slot: int | None = None
    started: float | None = None

    @property
    def num_slots(self) -> int:
        """That it has or needs."""
        return 1

    @property
    def is_preempted(self) -> bool:
        """Never: a text that has begun keeps its slot."""
        return False


class EncoderScheduler:
    """Waiting and running texts, under a budget of tokens a step and one of tokens in memory."""

    def __init__(self, max_batch_tokens: int, max_long_tokens: int) -> None:
        """max_long_tokens: of the long texts that are in memory together."""
        self._max_batch_tokens = max_batch_tokens
        self.max_long_tokens = max_long_tokens
        self._short: FairQueue[EncodeRequest] = FairQueue()
        self._long: FairQueue[EncodeRequest] = FairQueue()
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
        waiting = self._long if self.is_long(len(request.ids)) else self._short
        waiting.add(request)

    def remove(self, request: EncodeRequest) -> None:
        """Forget a text, wherever it is."""
        if request in self._running:
            self._running.remove(request)
            self._long.free(request.client, 1)
        else:
            self._short.remove(request)
            self._long.remove(request)

    def take_short(self, num_slots: int) -> list[EncodeRequest]:
        """Waiting short texts that one step reads together; they are not kept."""
        batch: list[EncodeRequest] = []
        num_tokens = 0
        while len(batch) < num_slots and (request := self._short.next()) is not None:
            num_tokens += len(request.ids)
            if num_tokens > self._max_batch_tokens:
                break
            self._short.admit(request)
            self._short.charge(request.client, len(request.ids) / self._max_batch_tokens)
            batch.append(request)
        for request in batch:
            self._short.free(request.client, 1)
        return batch

    def admit_long(self, num_slots: int) -> list[EncodeRequest]:
        """Waiting long texts for which there are slots and memory; they run from now on."""
        admitted: list[EncodeRequest] = []
        while len(admitted) < num_slots and (request := self._long.next()) is not None:
            if self.num_long_tokens + len(request.ids) > self.max_long_tokens:
                break
            self._long.admit(request)
            self._running.append(request)
            admitted.append(request)
        return admitted

    def next_long(self) -> EncodeRequest | None:
        """The running long text whose turn it is: the next one of the client that has had least."""
        if not self._running:
            return None
        request = self._long.least_served(self._running)
        self._running.remove(request)
        self._running.append(request)
        self._long.charge(request.client, 1)
        return request

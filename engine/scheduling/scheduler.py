"""Which requests run in the next step, under one token budget.

Decoding choices come first: one token each, or two while the state after the next renewal is
computed in the spare row. Prompts get part of the rest, so that they delay decoding by a bounded
time. Short prompts come first. There is no starvation: decoding choices take turns, the oldest
prompt has a share of every step, a waiting request is overtaken a bounded number of times by others
of its client, and clients take turns at the slots, which a running request gives up in its turn.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from cottention.engine.scheduling.batch import Batch, LookaheadRow, PrefillChunk
from cottention.engine.scheduling.client import Client
from cottention.engine.scheduling.fair_queue import FairQueue
from cottention.engine.scheduling.request import Choice, Request

_PREFILL_SHARE = 4
"""Prompts get at least 1/4 of the budget, and the oldest prompt 1/4 of what prompts get."""

_MIN_PREFILL_TOKENS = 16
"""Prompt tokens of a step with few decoding choices: fewer would take as long."""


class Admission(NamedTuple):
    """Running requests that give up their slots, and then the waiting ones that start."""

    preempted: list[Request]
    admitted: list[Request]


class Scheduler:
    """Queues: requests that wait for slots, prompts in prefill, decoding choices, and those of them
    that sit out because their next id waits for its mask.

    A paused request is in none of them.
    """

    def __init__(
        self,
        max_batch_tokens: int,
        max_prefill_tokens: int | None = None,
        max_preempted_states: int = 0,
    ) -> None:
        """max_prefill_tokens: limit for a step that also decodes; None: as many as it decodes.

        max_preempted_states: limit of choices that have started and wait for other clients.
        """
        self._budget = max_batch_tokens
        self._max_prefill_tokens = max_prefill_tokens
        self._max_preempted_states = max_preempted_states
        self._num_preempted_states = 0
        self._waiting: FairQueue[Request] = FairQueue()
        self._prefilling: deque[Request] = deque()
        self._decoding: deque[Choice] = deque()
        self._late: dict[Choice, None] = {}

    @property
    def num_waiting(self) -> int:
        """Requests without slots."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests with slots."""
        # one operation each: `stats` is called from other threads
        decoding = [*list(self._decoding), *list(self._late)]
        return len(self._prefilling) + len({choice.request for choice in decoding})

    @property
    def is_shared(self) -> bool:
        """Whether requests of several clients have slots."""
        clients = {choice.request.client for choice in [*self._decoding, *self._late]}
        return len(clients | {request.client for request in self._prefilling}) > 1

    @property
    def late_choices(self) -> list[Choice]:
        """Choices whose next id waits for its mask."""
        return [*self._late]

    def has_work(self) -> bool:
        """Whether any queue holds anything."""
        return bool(self._waiting or self._prefilling or self._decoding or self._late)

    def add(self, request: Request) -> None:
        """Queue a new request, after all others of its client and priority."""
        self._waiting.add(request)

    def add_resumed(self, request: Request) -> None:
        """Queue a request that had slots before, ahead of all others of its client and priority."""
        self._waiting.add(request, is_first=True)

    def admit(self, num_free_slots: int) -> Admission:
        """Take requests that may start now; each needs a slot for each unfinished choice.

        Where slots are missing, requests of clients that have had more give theirs up. A request
        that has to wait for slots is passed by those of other clients, and by none of its own.
        """
        preempted: list[Request] = []
        admitted: list[Request] = []
        blocked: list[Client] = []
        while (request := self._waiting.next(blocked)) is not None:
            num_missing = request.num_slots - num_free_slots
            victims = self._victims(request, num_missing) if num_missing > 0 else []
            if num_missing > 0 and not victims:
                blocked.append(request.client)
                continue
            for victim in victims:
                self._preempt(victim)
                num_free_slots += victim.num_slots
            preempted += victims
            self._start(request)
            num_free_slots -= request.num_slots
            admitted.append(request)
        return Admission(preempted, admitted)

    def _victims(self, request: Request, num_missing: int) -> list[Request]:
        """Running requests that give up as many slots for this one; none where it has to wait."""
        if not self._waiting.is_owed(request):
            return []
        victims = self._waiting.victims(request, num_missing, self._running())
        return victims if self._has_room_for(victims, request) else []

    def _running(self) -> dict[Request, None]:
        """Requests with slots, without repetition."""
        decoding = (choice.request for choice in [*self._decoding, *self._late])
        return dict.fromkeys([*self._prefilling, *decoding])

    def _has_room_for(self, victims: list[Request], request: Request) -> bool:
        """Whether the victims' states may be parked when those of the request no longer are."""
        num_states = self._num_preempted_states + _num_unfinished(victims)
        if request.is_preempted:
            num_states -= request.num_slots
        return num_states <= self._max_preempted_states

    def _preempt(self, request: Request) -> None:
        self.remove_request(request)
        request.is_preempted = True
        self._num_preempted_states += request.num_slots
        self._waiting.add(request)

    def _start(self, request: Request) -> None:
        self._waiting.admit(request)
        self._end_preemption(request)
        self._prefilling.append(request)

    def _end_preemption(self, request: Request) -> None:
        if request.is_preempted:
            request.is_preempted = False
            self._num_preempted_states -= request.num_slots

    def schedule(self) -> Batch:
        """The next step's batch. What does not fit into the budget comes first in a later step."""
        self._waiting.charge_step()
        reserved = max(1, self._budget // _PREFILL_SHARE) if self._prefilling else 0
        late = [choice for choice in self._late if choice.has_mask]
        batch = self._decode_batch(self._decoding, max(1, self._budget - reserved))
        self._decoding.rotate(-len(batch.decode))
        for choice in late:  # it decodes again when it has its id
            del self._late[choice]
            self._decoding.append(choice)
        num_tokens = len(batch.decode) + len(batch.lookahead)
        prefill = self._schedule_prefill(self._prefill_budget(num_tokens))
        return replace(batch, prefill=prefill, late=late)

    def schedule_ahead(self, batch: Batch, num_free_slots: int, max_rows: int) -> Batch | None:
        """The step after one whose ids are not known yet; None where these have to be waited for.

        Decoding choices alone, at most max_rows, and only where no prompt is prefilled and none
        could start. Those that end with the id sit it out, and so do those of sessions, which keep
        the state before their last id, since any id may be the last.
        """
        is_mixed = batch.prefill or batch.late or self._prefilling or self._late
        num_rows = len(batch.decode) + len(batch.lookahead)
        if is_mixed or num_rows > max_rows or self._can_admit(num_free_slots):
            return None
        ahead = [
            choice
            for choice in batch.decode
            if choice.num_generated < choice.max_ahead and choice.finish_reason is None
        ]
        if not ahead:
            return None
        known: list[Choice] = []
        if len(self._decoding) > len(ahead):
            in_flight = set(batch.decode)
            known = [choice for choice in self._decoding if choice not in in_flight]
        self._waiting.charge_step()
        return self._decode_batch([*known, *ahead], min(self._budget, max_rows), len(known))

    def _can_admit(self, num_free_slots: int) -> bool:
        """Whether `admit` would start a request."""
        blocked: list[Client] = []
        while (request := self._waiting.next(blocked)) is not None:
            num_missing = request.num_slots - num_free_slots
            if num_missing <= 0 or self._victims(request, num_missing):
                return True
            blocked.append(request.client)
        return False

    def _decode_batch(
        self, choices: Collection[Choice], budget: int, num_known: int | None = None
    ) -> Batch:
        """The choices that fit, at least one, and the lookahead rows among them.

        num_known: choices from there on are fed the id after the one that they are fed now.
        """
        decode = [*islice(choices, budget)]
        num_known = len(decode) if num_known is None else num_known
        indices = [choice.position for choice in decode]
        indices[num_known:] = [index + 1 for index in indices[num_known:]]
        lookahead: list[LookaheadRow] = []
        renewed: list[Choice] = []
        for place, (choice, index) in enumerate(zip(decode, indices, strict=True)):
            if index < choice.steady_until:
                continue
            start = choice.lookahead_start(index)
            num_tokens = place + len(lookahead) + (1 if start is None else 2)
            if place and num_tokens > budget:
                budget = min(budget, place + len(lookahead))
                break
            if choice.enter_context(index):
                renewed.append(choice)
            if start is not None:
                lookahead.append(LookaheadRow(choice, start, index))
        num = max(1, budget - len(lookahead))
        decode, indices = decode[:num], indices[:num]
        for choice, index in zip(decode, indices, strict=True):
            choice.num_fed = index + 1
        return Batch(
            decode,
            [],
            lookahead,
            indices=indices,
            renewed=renewed,
            num_ahead=max(0, len(decode) - num_known),
        )

    def _prefill_budget(self, num_decode: int) -> int:
        """Prompt tokens of the step: so few that they delay decoding by a step at most."""
        left = self._budget - num_decode
        if not num_decode:
            return left
        limit = self._max_prefill_tokens
        return min(left, max(_MIN_PREFILL_TOKENS, num_decode) if limit is None else limit)

    def _schedule_prefill(self, budget: int) -> list[PrefillChunk]:
        """Chunks, shortest remaining prompt first; a share is reserved for the oldest prompt.

        What is held comes after what it waits for.
        """
        chunks = []
        prompts = [request for request in self._prefilling if not request.is_held]
        oldest = prompts[0] if prompts else None
        reserved = max(1, budget // _PREFILL_SHARE)
        for request in sorted(prompts, key=_num_left):
            if request is oldest:
                reserved = 0
            if budget > reserved:
                start = request.num_prefilled
                stop = min(request.next_stop, start + budget - reserved)
                budget -= stop - start
                chunks.append(PrefillChunk(request, request.prefill_spans[0], start, stop))
        return chunks

    def start_decoding(self, request: Request) -> None:
        """Decode its choices from the next step on: the prompt has been prefilled."""
        self._prefilling.remove(request)
        for choice in request.unfinished_choices:
            self._decoding.append(choice)
            if choice.late_logits is not None:  # it was paused or preempted
                self.hold(choice)

    def hold(self, choice: Choice) -> None:
        """Let a decoding choice sit out until its mask is there: it has late logits."""
        self._decoding.remove(choice)
        self._late[choice] = None

    def remove_choice(self, choice: Choice) -> None:
        """Remove a decoding choice."""
        if choice in self._late:
            del self._late[choice]
        else:
            self._decoding.remove(choice)
        self._waiting.free(choice.request.client, 1)

    def remove_request(self, request: Request) -> None:
        """Remove a request from every queue, if it is in one."""
        self._waiting.remove(request)
        self._end_preemption(request)
        if request in self._prefilling:
            self._prefilling.remove(request)
            self._waiting.free(request.client, request.num_slots)
        decoding = [*self._decoding, *self._late]
        for choice in [choice for choice in decoding if choice.request is request]:
            self.remove_choice(choice)


def _num_left(request: Request) -> int:
    """Ids of the prompt, or of a shorter one that waits for it."""
    left = request.prefill_stop - request.num_prefilled
    followers = request.num_left_of_followers
    return left if followers is None else min(left, followers)


def _num_unfinished(requests: list[Request]) -> int:
    return sum(request.num_slots for request in requests)

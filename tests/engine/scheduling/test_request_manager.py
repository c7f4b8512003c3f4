"""The status of requests, without a model: which transitions there are, and what each implies."""

import random
from itertools import product

import pytest

from cottention.engine.outputs import FinishReason, Output
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.scheduling.batch import NO_IDS, BatchResult
from cottention.engine.scheduling.client import Client
from cottention.engine.scheduling.output_processor import OutputProcessor
from cottention.engine.scheduling.preemption import Preemption
from cottention.engine.scheduling.prefix_reuse import PrefixReuse
from cottention.engine.scheduling.request import Request, RequestStatus
from cottention.engine.scheduling.request_manager import RequestManager
from cottention.engine.scheduling.scheduler import Scheduler
from cottention.engine.state.pool import StatePool
from cottention.engine.state.prefix_cache import PrefixCache
from tests.engine.making import make_request, small_spec

WAITING, RUNNING, PAUSED, FINISHED = RequestStatus
LEGAL = {
    (WAITING, RUNNING),
    (WAITING, PAUSED),
    (WAITING, FINISHED),
    (RUNNING, WAITING),
    (RUNNING, PAUSED),
    (RUNNING, FINISHED),
    (PAUSED, WAITING),
    (PAUSED, FINISHED),
}


class Parts:
    """A request manager with a small pool; every step samples id 5 for each choice."""

    def __init__(self, num_slots: int, max_paused_states: int = 100) -> None:
        self.scheduler = Scheduler(16, max_preempted_states=4)
        self.pool = StatePool(small_spec("cottention"), num_slots, "cpu")
        self.manager = RequestManager(
            self.scheduler,
            self.pool,
            Preemption(self.pool, max_paused_states),
            PrefixReuse(self.pool, PrefixCache(0)),
            OutputProcessor(8),
        )
        self.requests: list[Request] = []
        self.ends: list[Output] = []

    def add(
        self, name: str, n: int = 1, length: int = 3, max_tokens: int = 50, client: str = ""
    ) -> Request:
        request = make_request(name, [1] * length, SamplingParams(n=n, max_tokens=max_tokens))
        request.client = Client(client)
        self.manager.reserve_id(name)
        self.manager.add(request)
        self.requests.append(request)
        return request

    def step(self) -> None:
        self.manager.admit()
        batch = self.scheduler.schedule()
        complete = [chunk.request for chunk in batch.prefill if chunk.is_last]
        choices = batch.decode + [choice for request in complete for choice in request.choices]
        self.note(self.manager.advance(batch, BatchResult([], NO_IDS)))
        for choice in choices:
            self.note([self.manager.append_token(choice, 5)])

    def note(self, outputs: list[Output]) -> None:
        self.ends += [out for out in outputs if out.finish_reason is not None]

    def check(self) -> None:
        """Slots belong to running requests, and nobody is in a queue that its status denies."""
        held = [
            choice.slot
            for each in self.requests
            for choice in each.choices
            if choice.slot is not None
        ]
        assert len(set(held)) == len(held) == self.pool.num_slots - self.pool.num_free
        statuses = [each.status for each in self.requests]
        assert self.scheduler.num_waiting == statuses.count(WAITING)
        assert self.scheduler.num_running == statuses.count(RUNNING)
        assert self.manager._preemption.num_paused == statuses.count(PAUSED)
        parked = [each for each in self.requests if each.is_preempted]
        assert all(each.status is WAITING for each in parked)
        num_parked = sum(len(each.unfinished_choices) for each in parked)
        assert self.manager._preemption.num_preempted_states == num_parked <= 4
        assert self.scheduler._num_preempted_states == num_parked
        for each in self.requests:
            is_running = each.status is RUNNING
            assert all((c.slot is not None) == is_running for c in each.unfinished_choices)
            assert (each.status is FINISHED) == (not each.unfinished_choices)
            assert (each.id in self.manager._requests) == (each.status is not FINISHED)


@pytest.mark.parametrize(("before", "after"), list(product(RequestStatus, repeat=2)))
def test_transitions_that_cannot_be_are_refused(
    before: RequestStatus, after: RequestStatus
) -> None:
    """A request that is resumed while it runs would be in two queues, and fed each id twice."""
    request = make_request("r", [1], SamplingParams())
    request.status = before
    if (before, after) in LEGAL:
        request.set_status(after)
        assert request.status is after
    else:
        with pytest.raises(AssertionError, match=f"{before.name} to {after.name}"):
            request.set_status(after)
        assert request.status is before


def test_a_request_from_its_arrival_to_its_end() -> None:
    parts = Parts(num_slots=1)
    request = parts.add("a")
    assert request.status is WAITING
    parts.step()
    assert request.status is RUNNING
    parts.manager.pause("a")
    assert (request.status, parts.pool.num_free) == (PAUSED, 1)
    parts.manager.resume("a")
    assert request.status is WAITING
    parts.manager.pause("a")
    assert request.status is PAUSED
    parts.manager.resume("a")
    parts.step()
    assert (request.status, parts.pool.num_free) == (RUNNING, 0)
    (last,) = parts.manager.cancel("a")
    assert (request.status, last.finish_reason) == (FINISHED, FinishReason.ABORT)
    parts.check()


def test_a_request_finishes_with_its_last_choice() -> None:
    parts = Parts(num_slots=2)
    request = parts.add("a", n=2, max_tokens=2)
    parts.step()
    first, second = request.choices
    assert parts.manager.append_token(first, 5).finish_reason is FinishReason.LENGTH
    assert (request.status, parts.pool.num_free) == (RUNNING, 1)
    parts.manager.append_token(second, 5)
    assert (request.status, parts.pool.num_free) == (FINISHED, 2)
    parts.check()


def test_verbs_that_do_not_fit_the_status_change_nothing() -> None:
    parts = Parts(num_slots=1)
    running, waiting = parts.add("running", length=40), parts.add("waiting")
    parts.manager.pause("waiting")
    parts.step()
    parts.manager.pause("running")  # its prompt is not complete
    for name in ("running", "waiting", "unknown"):
        parts.manager.resume(name)
    assert (running.status, waiting.status) == (RUNNING, WAITING)
    parts.manager.cancel("running")
    assert parts.manager.cancel("running") == parts.manager.pause("running") == []
    assert running.status is FINISHED
    parts.check()


@pytest.mark.parametrize("seed", range(10))
def test_status_slots_and_queues_agree_after_any_verbs(seed: int) -> None:
    rng = random.Random(seed)
    parts = Parts(num_slots=5, max_paused_states=2)
    for number in range(300):
        verb = rng.choice(["add", "step", "step", "pause", "pause", "resume", "cancel"])
        if verb == "add":
            length, max_tokens = rng.randint(1, 30), rng.choice([2, 30])
            client = rng.choice("abc")
            parts.add(str(number), rng.choice([1, 1, 3]), length, max_tokens, client)
        elif verb == "step":
            parts.step()
        elif parts.requests and (verb != "cancel" or rng.random() < 0.3):
            unfinished = [each for each in parts.requests if each.status is not FINISHED]
            name = rng.choice(unfinished[:8] or parts.requests).id
            parts.note(getattr(parts.manager, verb)(name))
        parts.check()
    parts.note(parts.manager.cancel_all())
    parts.check()
    assert all(each.status is FINISHED for each in parts.requests)
    assert len(parts.ends) == sum(len(each.choices) for each in parts.requests)
    assert {out.finish_reason for out in parts.ends} >= {
        FinishReason.LENGTH,
        FinishReason.SLOW_READER,
    }

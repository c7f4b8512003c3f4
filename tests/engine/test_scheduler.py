"""Who runs in a step: a budget, an order, and nobody left out."""

import random
from collections import Counter

import pytest

from engine.choice import Choice
from engine.detokenizer import Detokenizer
from engine.params import SamplingParams
from engine.renewal import Renewed
from engine.request import Request
from engine.scheduler import Plan, Scheduler
from tests.engine.making import make_request, small_tokenizer


def request(length: int = 1, n: int = 1, max_tokens: int = 16, name: str = "r") -> Request:
    params = SamplingParams(n=n, max_tokens=max_tokens)
    made = make_request(name, [0] * length, params)
    assert all(isinstance(choice.detokenizer, Detokenizer) for choice in made.choices)
    return made


def cost(plan: Plan) -> int:
    return (
        len(plan.decode) + len(plan.ahead) + sum(chunk.stop - chunk.start for chunk in plan.prefill)
    )


def run(scheduler: Scheduler, plan: Plan) -> list[Choice]:
    """What the registry does after a step; gives the choices that got a token."""
    grown = list(plan.decode)
    for chunk in plan.prefill:
        chunk.request.has_read(chunk.stop)
        if chunk.is_last:
            scheduler.start_choices(chunk.request)
            grown += chunk.request.choices
    for choice in grown:
        choice.num_generated += 1
    return grown


def running(scheduler: Scheduler, number: int) -> list[Request]:
    """Requests whose prompts have been read."""
    made = [request(name=f"running {i}") for i in range(number)]
    for each in made:
        scheduler.add(each)
    scheduler.admit(number)
    while any(each.num_read == 0 for each in made):
        run(scheduler, scheduler.schedule())
    return made


def test_nothing_to_do() -> None:
    scheduler = Scheduler(8)
    assert not scheduler.has_work()
    assert not scheduler.schedule()
    assert scheduler.admit(4) == []


def test_a_long_prompt_is_read_in_chunks_of_the_budget() -> None:
    scheduler = Scheduler(8)
    scheduler.add(request(length=20))
    scheduler.admit(1)
    spans = []
    while scheduler.num_running and len(spans) < 3:
        plan = scheduler.schedule()
        spans += [(chunk.start, chunk.stop, chunk.is_last) for chunk in plan.prefill]
        run(scheduler, plan)
    assert spans == [(0, 8, False), (8, 16, False), (16, 20, True)]


def test_a_prompt_of_exactly_the_budget() -> None:
    scheduler = Scheduler(8)
    scheduler.add(request(length=8))
    scheduler.admit(1)
    assert scheduler.schedule().prefill[0].is_last


def test_prompts_share_a_step_in_order_of_arrival() -> None:
    scheduler = Scheduler(8)
    lengths = [3, 4, 5]
    made = [request(length, name=str(length)) for length in lengths]
    for each in made:
        scheduler.add(each)
    scheduler.admit(3)
    plan = scheduler.schedule()
    assert [(chunk.request, chunk.stop) for chunk in plan.prefill] == [
        (made[0], 3),
        (made[1], 4),
        (made[2], 1),
    ]


def test_running_choices_come_first_and_prompts_get_their_share() -> None:
    scheduler = Scheduler(8)
    running(scheduler, 20)
    scheduler.add(request(length=100))
    scheduler.admit(1)
    plan = scheduler.schedule()
    assert len(plan.decode) == 6
    assert cost(plan) == 8


def test_without_prompts_running_choices_take_the_whole_budget() -> None:
    scheduler = Scheduler(8)
    running(scheduler, 20)
    assert len(scheduler.schedule().decode) == 8


def test_few_running_choices_leave_the_rest_to_prompts() -> None:
    scheduler = Scheduler(8)
    running(scheduler, 2)
    scheduler.add(request(length=100))
    scheduler.admit(1)
    plan = scheduler.schedule()
    assert (len(plan.decode), plan.prefill[0].stop) == (2, 6)


def test_more_running_than_budget_take_turns() -> None:
    """Of 20 choices with 8 places, each gets 40 of 100 steps."""
    scheduler = Scheduler(8)
    running(scheduler, 20)
    turns = Counter(choice for _ in range(100) for choice in scheduler.schedule().decode)
    assert set(turns.values()) == {40}
    assert len(turns) == 20


def test_admission_is_first_come_first_served() -> None:
    """A request that needs every slot is not overtaken by smaller ones behind it."""
    scheduler = Scheduler(8)
    first, wide, small = request(name="first"), request(n=4, name="wide"), request(name="small")
    for each in (first, wide, small):
        scheduler.add(each)
    assert scheduler.admit(4) == [first]
    assert scheduler.admit(3) == []
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)
    assert scheduler.admit(4) == [wide]
    assert scheduler.admit(1) == [small]


def test_choices_start_once_the_prompt_is_read() -> None:
    scheduler = Scheduler(8)
    made = request(length=9, n=3)
    scheduler.add(made)
    scheduler.admit(3)
    run(scheduler, scheduler.schedule())
    assert scheduler.schedule().decode == []
    run(scheduler, scheduler.schedule())
    assert scheduler.schedule().decode == made.choices
    assert scheduler.num_running == 1


@pytest.mark.parametrize("stage", ["waiting", "reading", "running"])
def test_a_request_is_removed_from_wherever_it_is(stage: str) -> None:
    scheduler = Scheduler(8)
    made, other = request(length=9, n=2), request(name="other")
    scheduler.add(made)
    if stage != "waiting":
        scheduler.admit(2)
        run(scheduler, scheduler.schedule())
    if stage == "running":
        run(scheduler, scheduler.schedule())
    scheduler.add(other)
    scheduler.remove_request(made)
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 1)
    scheduler.remove_request(other)
    scheduler.remove_request(other)
    assert not scheduler.has_work()


def test_a_plan_names_each_request_once() -> None:
    scheduler = Scheduler(8)
    made = request(n=3)
    scheduler.add(made)
    scheduler.admit(3)
    run(scheduler, scheduler.schedule())
    assert scheduler.schedule().requests == [made]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [2, 3, 16, 64])
def test_nobody_starves(budget: int, seed: int) -> None:
    """Random arrivals and lengths: every step keeps the budget, and waits are bounded.

    A running choice gets a token at least every ⌈slots / (budget − share)⌉ steps; the prompt at the
    head gets its share in every step.
    """
    rng = random.Random(seed)
    num_slots, scheduler, free = 12, Scheduler(budget), 12
    share = max(1, budget // 4)
    patience = -(-num_slots // (budget - share)) + 1
    last_turn: dict[Choice, int] = {}
    pending = [
        request(rng.choice([1, 5, 40]), rng.choice([1, 1, 3]), rng.randrange(1, 20), str(i))
        for i in range(30)
    ]
    step = 0
    while pending or scheduler.has_work():
        step += 1
        assert step < 10_000
        if pending and rng.random() < 0.3:
            scheduler.add(pending.pop())
        free -= sum(len(each.choices) for each in scheduler.admit(free))
        reading = next(iter(scheduler._reading), None)
        plan = scheduler.schedule()
        assert cost(plan) <= budget
        assert len(set(plan.decode)) == len(plan.decode)
        started = {chunk.request for chunk in plan.prefill}
        assert not started & {choice.request for choice in plan.decode}
        assert len(started) == len(plan.prefill)
        if reading is not None:
            head = plan.prefill[0]
            assert head.request is reading
            assert head.is_last or head.stop - head.start >= share
        for choice in run(scheduler, plan):
            last_turn[choice] = step
            if choice.num_generated == choice.request.params.max_tokens:
                scheduler.remove_choice(choice)
                del last_turn[choice]
                free += 1
        assert all(step - turn <= patience for turn in last_turn.values())
    assert free == num_slots


def test_a_choice_with_a_spare_row_costs_two() -> None:
    params = SamplingParams(max_tokens=100)
    scheduler = Scheduler(5)
    for place in range(4):
        made = Request.new(str(place), [0], params, small_tokenizer(), (), grid=Renewed(4, 2))
        scheduler.add(made)
    scheduler.admit(4)
    run(scheduler, scheduler.schedule())
    for _ in range(40):
        plan = scheduler.schedule()
        assert len(plan.decode) + len(plan.ahead) <= 5
        assert [c for c, _ in plan.ahead] == [c for c in plan.decode if c.ahead is not None]
        for choice in plan.decode:
            choice.position += 1
    assert min(choice.position for choice in scheduler._running) >= 20

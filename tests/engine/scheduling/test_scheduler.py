"""Who runs in a step: a budget, an order, and nobody left out."""

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cottention.engine.outputs import FinishReason
from cottention.engine.sampling.token_constraints import NO_CONSTRAINTS
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.scheduling.batch import Batch
from cottention.engine.scheduling.client import Client
from cottention.engine.scheduling.fair_queue import MAX_LAG, MAX_OVERTAKES, QUANTUM
from cottention.engine.scheduling.request import Choice, Request
from cottention.engine.scheduling.scheduler import Scheduler
from cottention.engine.state.context_window import ExactSchedule, RenewalSchedule
from cottention.engine.text.detokenizer import Detokenizer
from tests.engine.making import make_request, small_tokenizer


def request(length: int = 1, n: int = 1, max_tokens: int = 16, name: str = "r") -> Request:
    params = SamplingParams(n=n, max_tokens=max_tokens)
    made = make_request(name, [0] * length, params)
    assert all(isinstance(choice.detokenizer, Detokenizer) for choice in made.choices)
    return made


def cost(batch: Batch) -> int:
    return (
        len(batch.decode)
        + len(batch.lookahead)
        + sum(chunk.stop - chunk.start for chunk in batch.prefill)
    )


def run(scheduler: Scheduler, batch: Batch) -> list[Choice]:
    """What RequestManager does after a step; gives the choices that got a token."""
    grown = list(batch.decode)
    for chunk in batch.prefill:
        chunk.request.advance_prefill(chunk.stop)
        if chunk.is_last:
            scheduler.start_decoding(chunk.request)
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
    while any(each.num_prefilled == 0 for each in made):
        run(scheduler, scheduler.schedule())
    return made


def test_nothing_to_do() -> None:
    scheduler = Scheduler(8)
    assert not scheduler.has_work()
    assert not scheduler.schedule()
    assert scheduler.admit(4) == ([], [])


def test_a_long_prompt_is_read_in_chunks_of_the_budget() -> None:
    scheduler = Scheduler(8)
    scheduler.add(request(length=20))
    scheduler.admit(1)
    spans = []
    while scheduler.num_running and len(spans) < 3:
        batch = scheduler.schedule()
        spans += [(chunk.start, chunk.stop, chunk.is_last) for chunk in batch.prefill]
        run(scheduler, batch)
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
    batch = scheduler.schedule()
    assert [(chunk.request, chunk.stop) for chunk in batch.prefill] == [
        (made[0], 3),
        (made[1], 4),
        (made[2], 1),
    ]


def test_running_choices_come_first_and_prompts_get_their_share() -> None:
    scheduler = Scheduler(8)
    running(scheduler, 20)
    scheduler.add(request(length=100))
    scheduler.admit(1)
    batch = scheduler.schedule()
    assert len(batch.decode) == 6
    assert cost(batch) == 8


def test_without_prompts_running_choices_take_the_whole_budget() -> None:
    scheduler = Scheduler(8)
    running(scheduler, 20)
    assert len(scheduler.schedule().decode) == 8


def test_few_running_choices_leave_the_rest_to_prompts() -> None:
    scheduler = Scheduler(8)
    running(scheduler, 2)
    scheduler.add(request(length=100))
    scheduler.admit(1)
    batch = scheduler.schedule()
    assert (len(batch.decode), batch.prefill[0].stop) == (2, 6)


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
    assert scheduler.admit(4).admitted == [first]
    assert scheduler.admit(3).admitted == []
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)
    assert scheduler.admit(4).admitted == [wide]
    assert scheduler.admit(1).admitted == [small]


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


def test_a_short_prompt_does_not_wait_behind_a_long_one() -> None:
    """It is read in the step after its arrival; the long one goes on with its share."""
    scheduler = Scheduler(64)
    running(scheduler, 4)
    long = request(length=100_000, name="long")
    scheduler.add(long)
    scheduler.admit(1)
    run(scheduler, scheduler.schedule())
    short = [request(length=6, name=f"short {i}") for i in range(2)]
    for each in short:
        scheduler.add(each)
    scheduler.admit(2)
    batch = scheduler.schedule()
    assert [chunk.request for chunk in batch.prefill] == [*short, long]
    assert all(chunk.is_last for chunk in batch.prefill[:2])
    assert batch.prefill[2].stop - batch.prefill[2].start == 16 // 4


def test_the_oldest_prompt_has_its_share_however_many_shorter_ones_come() -> None:
    scheduler = Scheduler(64)
    long = request(length=1000, name="long")
    scheduler.add(long)
    scheduler.admit(1)
    for step in range(60):
        scheduler.add(request(length=60, name=str(step)))
        scheduler.admit(1)
        run(scheduler, scheduler.schedule())
        assert long.num_prefilled >= min(1000, 4 * (step + 1))


@pytest.mark.parametrize(
    ("num_running", "max_beside", "expected"),
    [(0, 3, 64), (4, None, 16), (24, None, 24), (4, 3, 3)],
)
def test_prompts_hold_up_those_that_run_by_so_much(
    num_running: int, max_beside: int | None, expected: int
) -> None:
    scheduler = Scheduler(64, max_beside)
    running(scheduler, num_running)
    scheduler.add(request(length=1000))
    scheduler.admit(1)
    batch = scheduler.schedule()
    assert len(batch.decode) == num_running
    assert batch.prefill[0].stop == expected


def test_lower_numbers_go_first_but_nobody_is_overtaken_for_ever() -> None:
    scheduler = Scheduler(8)
    patient = request(name="patient")
    patient.priority = 1
    scheduler.add(patient)
    order = []
    for number in range(MAX_OVERTAKES + 5):
        scheduler.add(request(name=str(number)))
        order += scheduler.admit(1).admitted
    assert order.index(patient) == MAX_OVERTAKES
    again = request(name="again")
    scheduler.add_resumed(again)
    assert scheduler.admit(1).admitted == [again]


class Simulation:
    """Random arrivals, lengths, priorities, clients, pauses and cancels, without a model.

    Every step keeps the budget, and waits are bounded: whoever waits is overtaken by no more than
    MAX_OVERTAKES others of its client beside those that were there before; a client with requests
    that wait has slots after so many steps; the oldest prompt that is read gets a fourth of what
    prompts get; whoever runs gets a token at least every so many steps.
    """

    def __init__(
        self, budget: int, seed: int, weights: Sequence[int] = (1,), num_slots: int = 12
    ) -> None:
        self.chance = random.Random(seed)
        self.budget = budget
        self.num_slots = num_slots
        self.clients = [Client(str(place), weight) for place, weight in enumerate(weights)]
        limit = self.num_slots * len(weights)
        self.scheduler = Scheduler(budget, max_preempted_states=limit)
        self.num_free = self.num_slots
        self.step = 0
        self.num_admitted: Counter[Client] = Counter()
        self.num_held: Counter[Client] = Counter()
        self.preempted: set[Request] = set()
        self.waits: dict[Client, tuple[int, int]] = {}
        self.patience = (QUANTUM + MAX_LAG) * sum(weights)
        self.admitted_by: dict[Request, int] = {}
        self.last_turn: dict[Choice, int] = {}
        self.paused: list[Request] = []

    def arrives(self, number: int) -> None:
        length = self.chance.choice([1, 5, 40, 400] if number % 50 else [4000])
        wide = self.chance.choice([1, 1, min(3, self.num_slots)])
        said = self.chance.randrange(1, 20)
        made = request(length, wide, said, str(number))
        made.priority = self.chance.choice([0, 0, 0, -1, 1])
        made.client = self.chance.choice(self.clients)
        if len(self.clients) > 1 and number % 40 == 0:  # as wide as all slots, for many turns
            made = request(length, self.num_slots, 60, str(number))
            made.client = self.chance.choice(self.clients)
        self.scheduler.add(made)
        self.begins_to_wait(made)

    def begins_to_wait(self, made: Request) -> None:
        older = sum(each.client == made.client for each in self.admitted_by)
        self.admitted_by[made] = self.num_admitted[made.client] + MAX_OVERTAKES + older

    def admit(self) -> None:
        preempted, admitted = self.scheduler.admit(self.num_free)
        for each in preempted:
            self.hold(each, -len(each.unfinished_choices))
            for choice in each.unfinished_choices:
                self.last_turn.pop(choice, None)
            self.preempted.add(each)
        for each in admitted:
            if each in self.preempted:
                self.preempted.remove(each)
            else:
                assert self.num_admitted[each.client] <= self.admitted_by.pop(each)
                self.num_admitted[each.client] += 1
            self.hold(each, len(each.unfinished_choices))
            if each.is_prefilled:  # it had paused
                self.scheduler.start_decoding(each)
                self.last_turn |= dict.fromkeys(each.unfinished_choices, self.step)
        assert self.num_free >= 0
        self.check_clients()

    def hold(self, made: Request, num_slots: int) -> None:
        self.num_free -= num_slots
        self.num_held[made.client] += num_slots

    def check_clients(self) -> None:
        """Those without slots have waited for so long, depending on what they wait for."""
        waits: dict[Client, tuple[int, int]] = {}
        for each in self.preempted.union(self.admitted_by):
            if not self.num_held[each.client]:
                since, widest = waits.get(each.client, self.waits.get(each.client, (self.step, 0)))
                waits[each.client] = since, max(widest, len(each.unfinished_choices))
        self.waits = waits
        for since, widest in waits.values():
            assert self.step - since <= widest * self.patience

    def advance(self) -> None:
        self.step += 1
        oldest = next(iter(self.scheduler._prefilling), None)
        batch = self.scheduler.schedule()
        assert cost(batch) <= self.budget
        assert len(set(batch.decode)) == len(batch.decode)
        assert len(batch.requests) == len({c.request for c in batch.decode}) + len(batch.prefill)
        if oldest is not None:
            self.check_share(oldest, batch)
        for choice in run(self.scheduler, batch):
            self.last_turn[choice] = self.step
            if choice.num_generated == choice.request.params.max_tokens:
                self.end(choice)
        reserved = max(1, self.budget // 4)
        patience = -(-self.num_slots // (self.budget - reserved)) + 1
        assert all(self.step - turn <= patience for turn in self.last_turn.values())

    def check_share(self, oldest: Request, batch: Batch) -> None:
        num_decode = len(batch.decode)
        prompts = min(self.budget - num_decode, max(16, num_decode) if num_decode else self.budget)
        (chunk,) = (chunk for chunk in batch.prefill if chunk.request is oldest)
        assert chunk.is_last or chunk.stop - chunk.start >= max(1, prompts // 4)

    def end(self, choice: Choice) -> None:
        choice.finish_reason = FinishReason.LENGTH
        self.scheduler.remove_choice(choice)
        del self.last_turn[choice]
        self.hold(choice.request, -1)

    def meddle(self) -> None:
        """One that runs is cancelled, or pauses, or goes on."""
        running = [choice.request for choice in self.scheduler._decoding]
        kind = self.chance.random()
        if running and kind < 0.02:
            made = self.chance.choice(running)
            self.scheduler.remove_request(made)
            self.hold(made, -len(made.unfinished_choices))
            for choice in made.unfinished_choices:
                del self.last_turn[choice]
            if kind < 0.01:
                self.paused.append(made)
        elif self.paused and kind < 0.1:
            made = self.paused.pop()
            self.scheduler.add_resumed(made)
            self.begins_to_wait(made)


@pytest.mark.parametrize(
    ("budget", "num_arrivals", "weights"),
    [
        (2, 40, (1,)),
        (3, 60, (1,)),
        pytest.param(16, 300, (1,), marks=pytest.mark.slow),
        pytest.param(16, 300, (1, 1, 1), marks=pytest.mark.slow),
        (16, 300, (4, 1, 2)),
        pytest.param(64, 10_000, (1,), marks=pytest.mark.slow),
        pytest.param(64, 3_000, (1, 3, 1, 1, 2), marks=pytest.mark.slow),
    ],
)
def test_nobody_starves(budget: int, num_arrivals: int, weights: tuple[int, ...]) -> None:
    simulate(Simulation(budget, budget, weights), num_arrivals)


@given(
    weights=st.lists(st.integers(1, 20), min_size=2, max_size=6),
    num_slots=st.integers(1, 12),
    budget=st.integers(2, 64),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=5, deadline=None)
def test_no_client_waits_for_longer_than_the_bound(
    weights: list[int], num_slots: int, budget: int, seed: int
) -> None:
    """The fair queue's, for any number of clients, weights, slots and requests."""
    simulate(Simulation(budget, seed, weights, num_slots), 60)


def simulate(simulation: Simulation, num_arrivals: int) -> None:
    """Let so many requests arrive, and step until all have ended."""
    num_arrived = 0
    while num_arrived < num_arrivals or simulation.scheduler.has_work() or simulation.paused:
        assert simulation.step < 200_000
        while num_arrived < num_arrivals and simulation.chance.random() < 0.3:
            simulation.arrives(num_arrived)
            num_arrived += 1
        simulation.meddle()
        simulation.admit()
        simulation.advance()
    assert simulation.num_free == simulation.num_slots
    assert simulation.admitted_by == {}


def client_requests(client: Client, n: int, num: int = 1) -> list[Request]:
    """Requests without an end in sight."""
    made = [request(n=n, max_tokens=10**6, name=f"{client.id} {i}") for i in range(num)]
    for each in made:
        each.client = client
    return made


def slots_by_client(scheduler: Scheduler, num_slots: int, num_steps: int) -> Counter[str]:
    """How many slots each client has had, summed over the steps."""
    num_free, held = num_slots, Counter[str]()
    for _ in range(num_steps):
        preempted, admitted = scheduler.admit(num_free)
        num_free += sum(len(each.choices) for each in preempted)
        num_free -= sum(len(each.choices) for each in admitted)
        for each in admitted:
            if each.is_prefilled:
                scheduler.start_decoding(each)
        batch = scheduler.schedule()
        run(scheduler, batch)
        for each in batch.requests:
            held[each.client.id] += len(each.choices)
    return held


@pytest.mark.parametrize("weight", [1, 3])
def test_clients_share_the_slots_by_weight(weight: int) -> None:
    """Whether they ask for all slots at a time or for one in each of many requests."""
    wide, many = Client("wide", weight), Client("many")
    scheduler = Scheduler(64, max_preempted_states=16)
    for each in [*client_requests(wide, 8), *client_requests(many, 1, 20)]:
        scheduler.add(each)
    held = slots_by_client(scheduler, 8, 2000)
    assert held.total() == 8 * 2000
    assert held["wide"] / held["many"] == pytest.approx(weight, rel=0.1)


def test_who_comes_to_a_full_engine_is_served_at_once() -> None:
    """One request takes one slot from whoever has many, the least important of its requests."""
    hog, other = Client("hog"), Client("other")
    scheduler = Scheduler(64, max_preempted_states=8)
    running = client_requests(hog, 1, 8)
    running[3].priority = 5
    for each in running:
        scheduler.add(each)
    slots_by_client(scheduler, 8, 100)
    (new,) = client_requests(other, 1)
    scheduler.add(new)
    assert scheduler.admit(0) == ([running[3]], [new])
    assert scheduler.admit(0) == ([], [])
    scheduler.remove_request(new)
    assert scheduler.admit(1) == ([], [running[3]])


def test_a_client_saves_up_no_more_than_a_quantum() -> None:
    """One that has asked for little for a long time does not keep the others out for as long."""
    hog, modest = Client("hog"), Client("modest")
    scheduler = Scheduler(64, max_preempted_states=16)
    for each in [*client_requests(hog, 1, 7), *client_requests(modest, 1)]:
        scheduler.add(each)
    assert slots_by_client(scheduler, 8, 1000) == {"hog": 7000, "modest": 1000}
    for each in [*client_requests(hog, 1, 7), *client_requests(modest, 8)]:
        scheduler.add(each)
    for each in [each for each in scheduler._running() if each.client == modest]:
        scheduler.remove_request(each)
    held = slots_by_client(scheduler, 8, 4 * int(QUANTUM))
    assert held["hog"] >= 8 * QUANTUM


def test_a_client_of_great_weight_saves_up_no_slot_either() -> None:
    """One whose only request has run for long gives its slot to one that needs them all."""
    few, hog, wide = Client("few", 20), Client("hog"), Client("wide")
    scheduler = Scheduler(64, max_preempted_states=16)
    for each in [*client_requests(few, 1), *client_requests(hog, 1, 7)]:
        scheduler.add(each)
    slots_by_client(scheduler, 8, 3000)
    (new,) = client_requests(wide, 8)
    scheduler.add(new)
    assert slots_by_client(scheduler, 0, int((QUANTUM + MAX_LAG) * 8 * 22))["wide"]


def test_a_priority_counts_among_the_requests_of_its_client() -> None:
    mine, others = Client("mine"), Client("others")
    scheduler = Scheduler(64)
    important, second = client_requests(others, 1, 2)
    important.priority = -(2**63)
    (own,) = client_requests(mine, 1)
    for each in (second, important, own):
        scheduler.add(each)
    scheduler.admit(1)
    assert scheduler.admit(1).admitted == [own]


def test_where_no_more_states_can_be_parked_others_go_first() -> None:
    """A request that would need all slots waits until they are free, and holds up nobody else."""
    scheduler = Scheduler(64, max_preempted_states=1)
    for each in client_requests(Client("hog"), 4, 2):
        scheduler.add(each)
    slots_by_client(scheduler, 8, 50)
    (wide,) = client_requests(Client("wide"), 8)
    scheduler.add(wide)
    assert scheduler.admit(0) == ([], [])
    hog = next(iter(scheduler._running()))
    scheduler.remove_request(hog)
    (narrow,) = client_requests(Client("narrow"), 1)
    scheduler.add(narrow)
    assert scheduler.admit(4) == ([], [narrow])
    scheduler.remove_request(next(iter(scheduler._running())))
    scheduler.remove_request(narrow)
    assert scheduler.admit(8) == ([], [wide])


def test_a_choice_with_a_spare_row_costs_two() -> None:
    params = SamplingParams(max_tokens=100)
    scheduler = Scheduler(5)
    for place in range(4):
        made = Request.new(
            str(place),
            [0],
            params,
            small_tokenizer(),
            NO_CONSTRAINTS,
            context_schedule=RenewalSchedule(4, 2),
        )
        scheduler.add(made)
    scheduler.admit(4)
    run(scheduler, scheduler.schedule())
    for _ in range(40):
        batch = scheduler.schedule()
        assert len(batch.decode) + len(batch.lookahead) <= 5
        assert [each.choice for each in batch.lookahead] == [
            c for c in batch.decode if c.lookahead_start(c.position) is not None
        ]
        for choice in batch.decode:
            choice.position += 1
    assert min(choice.position for choice in scheduler._decoding) >= 20


def test_steps_ahead_take_turns_under_a_budget_and_feed_each_id_once() -> None:
    """Those whose id is not known yet come last: else those that sat out a step would never run."""
    params = SamplingParams(max_tokens=1000)
    scheduler = Scheduler(8)
    schedules = [ExactSchedule(), RenewalSchedule(4, 2)]
    for place in range(9):
        schedule = schedules[place % 2]
        made = Request.new(
            str(place), [0], params, small_tokenizer(), NO_CONSTRAINTS, context_schedule=schedule
        )
        scheduler.add(made)
    scheduler.admit(9)
    while scheduler._prefilling:
        run(scheduler, scheduler.schedule())
    choices = [*scheduler._decoding]
    for choice in choices[:7]:
        choice.set_plain()  # the others are never ahead
    fed: dict[Choice, list[int]] = {choice: [] for choice in choices}
    batch, num_ahead = scheduler.schedule(), 0
    for _ in range(200):
        following = scheduler.schedule_ahead(batch, num_free_slots=0, max_rows=8)
        assert len(batch.decode) + len(batch.lookahead) <= 8
        num_ahead += batch.num_ahead
        for choice, index in zip(batch.decode, batch.indices, strict=True):
            fed[choice].append(index)
            choice.position += 1
            choice.num_generated += 1
        assert all(c.is_plain for c in batch.decode[len(batch.decode) - batch.num_ahead :])
        batch = following or scheduler.schedule()
    for indices in fed.values():
        assert indices == list(range(indices[0], indices[0] + len(indices)))
        assert len(indices) > 50
    assert num_ahead > 200


def test_no_step_is_ahead_of_a_prompt_or_of_a_request_that_can_start() -> None:
    scheduler = Scheduler(8)
    (first,) = client_requests(Client("a"), 1)
    scheduler.add(first)
    scheduler.admit(1)
    run(scheduler, scheduler.schedule())
    (choice,) = first.choices
    choice.set_plain()
    batch = scheduler.schedule()
    assert scheduler.schedule_ahead(batch, 0, max_rows=8) is not None
    assert scheduler.schedule_ahead(batch, 0, max_rows=0) is None
    (second,) = client_requests(Client("a"), 1)
    scheduler.add(second)
    assert scheduler.schedule_ahead(batch, 0, max_rows=8) is not None  # it has to wait
    assert scheduler.schedule_ahead(batch, 1, max_rows=8) is None
    scheduler.admit(1)
    assert scheduler.schedule_ahead(batch, 0, max_rows=8) is None

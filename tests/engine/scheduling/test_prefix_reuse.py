"""Prompts that begin alike and part somewhere: what they have in common is read once.

What is said never changes; `every_attention` tests beside these compare warm with cold answers.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from cottention.engine import Engine, FinishReason, Output, SamplingParams
from cottention.engine.scheduling.client import Client
from cottention.engine.scheduling.prefill_stops import (
    BLOCK,
    MIN_GAIN,
    NUM_BETWEEN,
    CacheUse,
    planned_stops,
)
from tests.engine.state.test_prefix_cache import ids_from
from tests.engine.windows import PARAMS, Told, drain, engine_of, told

WINDOW = 512
SHARED, NUM_TAILS = 2000, 64
ANSWER = replace(PARAMS, max_tokens=3)
USE = CacheUse("a")


def num_read(engine: Engine) -> int:
    return engine.stats().num_prompt_tokens


def tails(lengths: Sequence[int]) -> list[list[int]]:
    beginning = ids_from(1, SHARED)
    return [beginning + ids_from(100 + place, num) for place, num in enumerate(lengths)]


@pytest.fixture(params=["exact", "renew"])
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def warm(policy: str) -> Engine:
    return engine_of(WINDOW, context_policy=policy, max_slots=8, max_batch_tokens=512)


@pytest.fixture
def cold(policy: str) -> Engine:
    return engine_of(WINDOW, context_policy=policy, prefix_cache_bytes=0, max_slots=8)


def ask(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams = ANSWER
) -> list[list[Told]]:
    """All of them at once; what each drew."""
    names = [engine.submit(each, params, cache=USE) for each in prompts]
    outputs = drain(engine)
    return [told(outputs, name) for name in names]


@pytest.mark.parametrize("are_together", [False, True], ids=["in turn", "together"])
def test_a_shared_beginning_is_read_once(warm: Engine, cold: Engine, are_together: bool) -> None:
    prompts = tails([16 + place % 15 for place in range(NUM_TAILS)])
    first = ask(warm, prompts[:1])
    num_first = num_read(warm)
    batches = [prompts[1:]] if are_together else [[each] for each in prompts[1:]]
    said = first + [each for batch in batches for each in ask(warm, batch)]
    assert num_read(warm) <= 1.1 * (num_first + sum(len(each) - SHARED for each in prompts))
    for place in (0, 1, 2, 17, 63):
        assert said[place] == ask(cold, [prompts[place]])[0]


@pytest.mark.parametrize("policy", ["renew"], indirect=True)
def test_a_second_context_is_shared_as_well(warm: Engine, cold: Engine) -> None:
    """Answers that go on past a renewal have a spare row, for which tails are read again."""
    params = replace(ANSWER, max_tokens=60)
    prompts = tails([16 + place for place in range(12)])
    said = ask(warm, prompts[:1], params)
    num_first = num_read(warm)
    said += ask(warm, prompts[1:2], params) + ask(warm, prompts[2:], params)
    tokens = sum(len(each) - SHARED for each in prompts)
    assert num_first > num_read_of(cold, prompts[:1])
    assert num_read(warm) <= 1.1 * (num_first + 2 * tokens)
    for place in (1, 2, 11):
        assert said[place] == ask(cold, [prompts[place]], params)[0]


def test_those_that_come_at_once_wait_for_one(warm: Engine, cold: Engine, policy: str) -> None:
    """None of them has been read before; two groups that part from each other early."""
    groups = [tails([20 + place for place in range(5)]) for _ in range(2)]
    groups[1] = [[*each[:1700], *ids_from(7, 300), *each[SHARED:]] for each in groups[1]]
    prompts = [each for pair in zip(*groups, strict=True) for each in pair]
    said = ask(warm, prompts)
    alone = 2 * num_read_of(cold, prompts[:1])
    common = 1700 - (1536 if policy == "renew" else 0)  # where the last context begins
    new = sum(len(each) - SHARED for each in prompts)
    assert num_read(warm) <= alone - common + new
    for place in (0, 1, 9):
        assert said[place] == ask(cold, prompts[place : place + 1])[0]


def num_read_of(engine: Engine, prompts: Sequence[Sequence[int]]) -> int:
    before = num_read(engine)
    ask(engine, prompts)
    return num_read(engine) - before


@pytest.mark.parametrize("ending", ["cancel", "pause"])
def test_nobody_waits_for_one_that_is_gone(warm: Engine, cold: Engine, ending: str) -> None:
    prompts = tails([20, 21, 22])
    names = [warm.submit(each, ANSWER, cache=USE) for each in prompts]
    outputs: list[Output] = warm.step()
    if ending == "cancel":
        warm.cancel(names[0])
    else:  # it takes effect when the prompt has been read
        warm.pause(names[0])
    outputs += drain(warm) if ending == "cancel" else list(until_idle(warm))
    for name, prompt in zip(names[1:], prompts[1:], strict=True):
        assert told(outputs, name) == ask(cold, [prompt])[0]
    warm.resume(names[0])
    outputs += drain(warm)
    assert warm.stats().num_waiting == warm.stats().num_running == 0


def until_idle(engine: Engine) -> Iterator[Output]:
    while engine.has_work():
        yield from engine.step()


@pytest.mark.parametrize("seed", range(3))
def test_any_company_leaves_answers_as_they_are(policy: str, seed: int) -> None:
    """Prompts of a few beginnings come at any time, wait, are cancelled and give up their slots.

    The cache has room for a few states, and a second client takes turns at the slots.
    """
    chance = random.Random(seed)
    beginnings = [ids_from(place, 90) for place in range(2)]
    few = {"context_policy": policy, "max_slots": 3, "max_batch_tokens": 24}
    warm = engine_of(150, prefix_cache_bytes=1, **few)
    warm = engine_of(150, prefix_cache_bytes=6 * warm.spec.bytes_per_slot, **few)
    cold = engine_of(150, prefix_cache_bytes=0, context_policy=policy)
    prompts, outputs = {}, []
    for number in range(30):
        ids = chance.choice(beginnings)[: chance.randrange(40, 91)]
        ids += chance.choice(beginnings) * chance.randrange(2) + ids_from(number, 5)
        params = replace(PARAMS, max_tokens=chance.choice([1, 3, 30]))
        client = Client(f"{number % 2}", 1 + number % 2)
        name = warm.submit(ids, params, cache=USE, client=client)
        prompts[name] = ids, params
        for _ in range(chance.randrange(6)):
            outputs += warm.step()
        if chance.random() < 0.2:
            del prompts[gone := chance.choice([*prompts])]
            warm.cancel(gone)
        if chance.random() < 0.2:
            warm.pause(chance.choice([*prompts]))
    for name in prompts:
        outputs += until_idle(warm)
        warm.resume(name)
    outputs += drain(warm)
    assert warm.stats().prefix_cache.num_hit > 0
    ended = {out.request_id: out.finish_reason for out in outputs if out.finish_reason}
    whole = [name for name in prompts if ended[name] is not FinishReason.SLOW_READER]
    assert len(whole) > 15
    for name in whole[::3]:
        ids, params = prompts[name]
        cold_name = cold.submit(ids, params)
        assert told(outputs, name) == told(drain(cold), cold_name)


def test_the_issue_s_case(warm: Engine) -> None:
    """Two prompts of 450 ids that share the first 300; a third parts where the second did."""
    beginning = ids_from(1, 300)
    prompts = [beginning + ids_from(seed, 150) for seed in (2, 3, 4)]
    ask(warm, prompts[:1])
    cached = []
    for prompt in prompts[1:]:
        warm.submit(prompt, ANSWER, cache=USE)
        cached.append(max(out.num_cached for out in drain(warm)))
    assert 300 - 2 * BLOCK <= cached[0] <= 300
    assert cached[1] == 300


@pytest.mark.parametrize(
    ("first", "second", "is_found"),
    [
        (USE, replace(USE, reads=False), False),
        (replace(USE, writes=False), USE, False),
        (USE, replace(USE, writes=False), True),
        (replace(USE, reads=False), USE, True),
    ],
)
def test_reading_and_writing_can_be_refused(
    warm: Engine, first: CacheUse, second: CacheUse, is_found: bool
) -> None:
    prompt = ids_from(1, 300)
    cached = []
    for use in (first, second):
        warm.submit(prompt, ANSWER, cache=use)
        nbytes = warm.stats().prefix_cache.nbytes
        cached.append(max(out.num_cached for out in drain(warm)))
        if not use.writes:
            assert warm.stats().prefix_cache.nbytes == nbytes
    assert cached[0] == 0
    assert bool(cached[1]) is is_found


def test_a_message_s_end_is_a_place_to_begin(warm: Engine) -> None:
    """The first prompt's, that no other has shown to be one."""
    system, place = ids_from(1, 137), 137
    warm.submit(system + ids_from(2, 60), ANSWER, cache=replace(USE, boundaries=(place,)))
    drain(warm)
    warm.submit(system + ids_from(3, 60), ANSWER, cache=USE)
    assert max(out.num_cached for out in drain(warm)) == place


def test_what_is_kept_of_a_prompt_is_bounded() -> None:
    """However long it is, and however many messages it has."""
    for stop in (65, 450, 2000, 20_000, 1_000_000):
        stops = planned_stops(0, 0, 0, stop, range(20, stop, 50)[:10_000])
        places = [0, *sorted(stops)]
        assert len(stops) <= NUM_BETWEEN + 3
        gaps = [b - a for a, b in pairwise([*places, stop])]
        assert max(gaps) <= max(4 * BLOCK, 2 * (stop // NUM_BETWEEN + BLOCK))


def test_where_a_prompt_parts_comes_first() -> None:
    stops = planned_stops(0, 128, 300, 450, ())
    assert stops == {300: True, 384: False, 448: False}
    assert planned_stops(0, 128, 128 + MIN_GAIN - 1, 150, ()) == {}
    assert planned_stops(0, 0, 450, 450, ()) == {}

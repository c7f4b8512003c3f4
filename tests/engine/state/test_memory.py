"""A long stream costs what a short one costs. Token 50,000 is for `make bench`."""

import gc

import psutil
import pytest

from cottention.engine import Engine, EngineConfig, SamplingParams
from tests.engine.making import SESSION_FAMILIES, family_folder

MIB = 2**20


def resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


@pytest.mark.slow
def test_resident_memory_is_flat(engine: Engine) -> None:
    """Token 500 to token 5,000 of one stream, far past the model's 64 positions."""
    pool = engine.pool.nbytes
    assert pool == engine.spec.bytes_per_slot * 4
    params = SamplingParams(max_tokens=5000, ignore_eos=True, seed=0, stop=("never to be seen",))
    after: list[int] = []
    for number, _ in enumerate(engine.stream("a", params), start=1):
        if number % 500 == 0:
            after.append(resident())
    assert len(after) == 10
    assert max(after) - after[0] <= 2 * MIB
    assert engine.pool.nbytes == pool


@pytest.mark.slow
@pytest.mark.parametrize("family", SESSION_FAMILIES)
def test_memory_of_a_recurrent_family_is_flat(family: str) -> None:
    """Token 250 to token 1,000 of one stream; the pool has the bytes that the spec itemises."""
    engine = Engine(family_folder(family), EngineConfig(max_slots=2))
    each = sum(engine.spec.itemised_bytes().values())
    params = SamplingParams(max_tokens=1000, ignore_eos=True, seed=0)
    assert engine.pool.nbytes == 2 * each == 2 * engine.spec.bytes_per_slot
    after: list[int] = []
    for number, _ in enumerate(engine.stream("a", params), start=1):
        if number % 250 == 0:
            after.append(resident())
    assert len(after) == 4
    assert max(after) - after[0] <= 2 * MIB
    assert engine.pool.nbytes == 2 * each


def test_many_requests_leave_nothing_behind(engine: Engine) -> None:
    params = SamplingParams(max_tokens=2, n=4, ignore_eos=True)
    prompt = engine.tokenizer.encode("a prompt of some words")
    for _ in range(10):
        engine.generate([prompt], params)
    before = resident()
    for _ in range(50):
        engine.generate([prompt], params)
    assert resident() - before <= 2 * MIB
    assert not engine._request_manager._requests

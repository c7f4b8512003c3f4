"""Masks that take long: who waits for them, and that answers stay the same."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cottention.engine import Engine, EngineConfig, FinishReason, SamplingParams
from cottention.engine.grammar import mask_worker
from cottention.engine.grammar.mask_worker import MaskAccounts
from cottention.engine.outputs import Output
from cottention.engine.scheduling.client import Client
from cottention.engine.state.session_state import SessionState
from cottention.engine.structured_output import TextStructure
from tests.engine.making import attention_folder

HEAVY, OTHER = Client("heavy"), Client("other")
FREE = SamplingParams(max_tokens=40, seed=4, ignore_eos=True)


def pattern(regex: str) -> SamplingParams:
    return SamplingParams(structured=TextStructure("regex", regex), max_tokens=60, seed=1)


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(attention_folder("cottention"), EngineConfig(max_slots=4))
    yield engine
    engine.close()


@contextmanager
def busy(engine: Engine, lane: int) -> Iterator[None]:
    """While a thread for masks is at one that takes as long as this block does."""
    engine.generate(["x"], pattern("[ab]{2}"))  # threads start with the first masks
    lanes, done = engine._mask_worker._lanes, threading.Event()
    assert lanes is not None
    lanes[lane].submit(lambda: done.wait(60) and None)
    try:
        yield
    finally:
        done.set()


def submit(engine: Engine, params: SamplingParams, client: Client, **more: Any) -> str:
    return engine.submit(engine.tokenizer.encode("x = "), params, client=client, **more)


def run(engine: Engine, name: str, parts: dict[str, list[Output]]) -> tuple[int, ...]:
    """Step until this request has ended: its ids."""
    while not (parts.get(name) and parts[name][-1].finish_reason):
        step(engine, parts)
    return tuple(each for out in parts[name] for each in out.token_ids)


def step(engine: Engine, parts: dict[str, list[Output]]) -> None:
    for out in engine.step():
        parts.setdefault(out.request_id, []).append(out)


def test_others_step_while_a_heavy_mask_is_computed(engine: Engine) -> None:
    """Else a grammar of one key, a tenth of a second a mask, makes everyone's tokens as slow."""
    heavy = pattern("[a-f]{9}")
    alone = [engine.generate(["x = "], each)[0].token_ids for each in (heavy, FREE)]
    parts: dict[str, list[Output]] = {}
    with busy(engine, 0):
        names = [submit(engine, heavy, HEAVY), submit(engine, FREE, OTHER)]
        assert run(engine, names[1], parts) == alone[1]
        assert len(parts[names[0]]) == 1, "the first mask is there from the beginning"
        (late,) = engine._scheduler.late_choices
        assert late.pending == []
        late_engine_steps = engine.stats().num_steps
        step(engine, parts)  # nothing to do: it waits a moment, and returns
        assert engine.stats().num_steps == late_engine_steps
    assert run(engine, names[0], parts) == alone[0]
    assert parts[names[0]][-1].finish_reason is FinishReason.STOP


def test_a_late_choice_is_paused_preempted_and_cancelled(engine: Engine) -> None:
    """Its state is ahead of its ids then, by the one whose mask is waited for."""
    heavy = pattern("[a-f]{9}")
    alone = engine.generate(["x = "], heavy)[0].token_ids
    parts: dict[str, list[Output]] = {}
    with busy(engine, 0):
        paused, cancelled = (submit(engine, heavy, HEAVY) for _ in range(2))
        run(engine, submit(engine, FREE, OTHER), parts)
        assert len(engine._scheduler.late_choices) == 2
        engine.pause(paused)
        engine.cancel(cancelled)
        step(engine, parts)
        assert parts[cancelled][-1].finish_reason is FinishReason.ABORT
        assert engine.stats().num_paused == 1
        assert engine.stats().num_free_slots == 4
    engine.resume(paused)
    assert run(engine, paused, parts) == alone


def test_a_session_s_turn_that_is_cut_while_it_waits_goes_on_rightly(engine: Engine) -> None:
    """A session's last id is never in its state; a late choice's last id is."""
    heavy, parts = pattern("[a-f]{9}"), dict[str, list[Output]]()
    with busy(engine, 0):
        name = submit(engine, heavy, HEAVY, start=SessionState())
        run(engine, submit(engine, FREE, OTHER), parts)
        engine.cancel(name, FinishReason.LENGTH)
        step(engine, parts)
    state = parts[name][-1].state
    assert state is not None
    first = tuple(each for out in parts[name] for each in out.token_ids)
    prompt = [*engine.tokenizer.encode("x = "), *first, *engine.tokenizer.encode(" y")]
    plain = engine.submit(prompt, FREE)
    turn = engine.submit(engine.tokenizer.encode(" y"), FREE, start=state)
    assert run(engine, turn, parts) == run(engine, plain, parts)


def test_a_client_above_its_share_waits_behind_others(engine: Engine) -> None:
    """Else its masks are computed before those of others, and these wait for them all the same."""
    heavy, light = pattern("[a-f]{9}"), pattern("[g-k]{9}")
    alone = [engine.generate(["x = "], each)[0].token_ids for each in (heavy, light)]
    parts: dict[str, list[Output]] = {}
    with busy(engine, 1):
        engine._mask_worker._accounts.charge(HEAVY, 1000.0)
        names = [submit(engine, heavy, HEAVY), submit(engine, light, OTHER)]
        assert run(engine, names[1], parts) == alone[1]
        assert len(parts[names[0]]) == 1
    assert run(engine, names[0], parts) == alone[0]


def test_accounts_forget_and_learn() -> None:
    now = 0.0
    accounts = MaskAccounts(lambda: now)
    accounts.charge("a", 1.0)
    assert accounts.is_above_share("a")
    assert not accounts.is_above_share("b")
    now = 0.96 / mask_worker.MASK_SHARE
    assert not accounts.is_above_share("a")
    assert accounts.num_call_rows("a", is_shared=True) == 5
    for _ in range(30):
        accounts.note("a", 16, 0.0005)
    assert accounts.num_call_rows("a", is_shared=True) == mask_worker.MAX_CALL_ROWS
    accounts.note("a", 16, 3.0)
    assert accounts.num_call_rows("a", is_shared=True) == 1
    assert accounts.num_call_rows("b", is_shared=False) > mask_worker.MAX_CALL_ROWS
    now = 100.0
    accounts.charge("c", 1000.0)
    for name in range(3 * mask_worker.MAX_ACCOUNTS):
        accounts.note(name, 1, 0.0)
    assert len(accounts._accounts) <= mask_worker.MAX_ACCOUNTS
    assert accounts.is_above_share("c")

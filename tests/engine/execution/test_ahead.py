"""Steps that begin before the ids of the step before are known: nobody can tell from the outputs.

A graph on the CPU is called in place of captured; what differs from a GPU is that it is never late.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cottention.engine import Engine, EngineConfig, FinishReason, Output, SamplingParams
from cottention.engine.scheduling.batch import Batch
from cottention.engine.scheduling.prefill_stops import CacheUse
from tests.engine.execution.test_cuda_graphs import captured_on_cpu

KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 5},
    {"seed": 6, "temperature": 1.5, "top_p": 0.9, "top_k": 30},
    {"seed": 7, "repetition_penalty": 1.5},
    {"temperature": 0, "logprobs": 2},
    {"seed": 8, "min_tokens": 6, "ignore_eos": False},
    {"seed": 9, "n": 3},
    {"seed": 10, "stop": ("e", "a")},
]


def engine_of(folder: Path, *, ahead: bool, **more: Any) -> Engine:
    config = EngineConfig(**{"max_slots": 6, "max_batch_tokens": 16, "device": "cpu", **more})
    engine = Engine(folder, config)
    if ahead:
        engine._runner._captured = captured_on_cpu(engine._runner, engine.pool.num_rows)
    return engine


def batches_of(engine: Engine) -> list[Batch]:
    """Notes the batches that an engine runs."""
    seen: list[Batch] = []
    run = engine._runner.run

    def noting(batch: Batch, *given: Any) -> Any:
        seen.append(batch)
        return run(batch, *given)

    engine._runner.run = noting  # type: ignore[method-assign]
    return seen


def life(engine: Engine, seed: int) -> dict[tuple[str, int], list[Output]]:
    """Requests of all kinds that come, are paused, resumed and cancelled at some steps."""
    rng = random.Random(seed)
    parts: dict[tuple[str, int], list[Output]] = {}
    names: list[str] = []

    def step() -> None:
        for out in engine.step():
            parts.setdefault((out.request_id, out.choice), []).append(out)

    for number in range(14):
        kind = rng.choice(KINDS)
        params = SamplingParams(**{"max_tokens": rng.randint(6, 25), "ignore_eos": True, **kind})
        prompt = [rng.randint(1, 200) for _ in range(rng.randint(1, 20))]
        names.append(f"{seed}-{number}")
        engine.submit(prompt, params, request_id=names[-1])
        for _ in range(rng.choice([0, 1, 5, 9])):
            step()
        if rng.random() < 0.4:
            name = rng.choice(names)
            engine.pause(name)
            step()
            engine.resume(name)
    while engine.has_work():
        step()
    return parts


def told(parts: list[Output]) -> tuple[Any, ...]:
    """What a client learns of a choice, whatever the steps in which it came."""
    ids = tuple(token_id for out in parts for token_id in out.token_ids)
    text = "".join(out.text for out in parts)
    logprobs = tuple(each for out in parts for each in out.logprobs)
    starts = [out.context_start for out in parts if out.token_ids]
    return ids, text, logprobs, starts, parts[-1].finish_reason, parts[-1].stop_reason


@pytest.mark.parametrize("seed", range(6))
def test_outputs_are_those_of_an_engine_that_waits(gptj_folder: Path, seed: int) -> None:
    """Among choices that end, prompts that come, requests that are paused: ids, text, reasons."""
    waiting, ahead = engine_of(gptj_folder, ahead=False), engine_of(gptj_folder, ahead=True)
    batches = batches_of(ahead)
    expected, found = life(waiting, seed), life(ahead, seed)
    assert found.keys() == expected.keys()
    for key, parts in expected.items():
        assert told(found[key]) == told(parts)
    assert any(batch.num_ahead for batch in batches)
    assert ahead.pool.num_free == ahead.pool.num_slots


@pytest.mark.every_attention
def test_renewals_run_ahead(gptj_folder: Path) -> None:
    """Spare rows are fed the same unread ids, and contexts change where they always did."""
    engines = [engine_of(gptj_folder, ahead=ahead, context_policy="renew") for ahead in (0, 1)]
    assert engines[0].policies.window is not None
    num = 2 * engines[0].policies.window + 9
    params = SamplingParams(max_tokens=num, seed=4, ignore_eos=True)
    batches = batches_of(engines[1])
    first, second = (engine.generate([[3, 4], [5]], params) for engine in engines)
    assert second == first
    assert any(batch.num_ahead and batch.lookahead for batch in batches)
    assert any(batch.num_ahead and batch.renewed for batch in batches)


def test_a_choice_whose_state_is_kept_is_never_ahead(gptj_folder: Path) -> None:
    """Its last id would be in the row, and a row cannot be un-stepped."""
    params = SamplingParams(max_tokens=30, seed=2, ignore_eos=True)
    states = []
    for is_ahead in (False, True):
        engine = engine_of(gptj_folder, ahead=is_ahead)
        batches = batches_of(engine)
        start = engine.policies.new_session(None)
        engine.submit([4, 5], params, request_id="kept", start=start)
        engine.submit([6], replace(params, max_tokens=60), request_id="free")
        last = [out for _ in range(200) for out in engine.step() if out.finish_reason]
        [state] = [out.state for out in last if out.state is not None]
        states.append(state)
        ahead = {c.request.id for b in batches if b.num_ahead for c in b.decode[-b.num_ahead :]}
        assert ahead == ({"free"} if is_ahead else set())
    assert states[0].position == states[1].position
    assert states[0].pending == states[1].pending
    assert all((a == b).all() for a, b in zip(states[0].rows, states[1].rows, strict=True))


def test_the_state_after_an_answer_is_kept_with_the_id_that_was_fed_ahead(
    gptj_folder: Path,
) -> None:
    """The cache has it under the ids that are in it: what goes on from there is the same."""
    params = SamplingParams(max_tokens=40, seed=3, stop_token_ids=(), ignore_eos=True)
    answers, num_cached = [], []
    for is_ahead in (False, True):
        engine = engine_of(gptj_folder, ahead=is_ahead, context_policy="exact")
        prompt = [9] * 20
        first = engine.generate([prompt], params)[0].token_ids
        stopped = replace(params, stop_token_ids=(first[30],), ignore_eos=False)
        engine.submit(prompt, stopped, cache=CacheUse("a"))
        outputs = [out for _ in range(60) for out in engine.step()]
        said = [token_id for out in outputs for token_id in out.token_ids]
        assert outputs[-1].finish_reason is FinishReason.STOP
        engine.submit([*prompt, *said, 5, 6, 7], params, cache=CacheUse("a"))
        outputs = [out for _ in range(60) for out in engine.step()]
        answers.append(tuple(token_id for out in outputs for token_id in out.token_ids))
        num_cached.append(outputs[-1].num_cached - len(prompt) - len(said))
    assert answers[0] == answers[1]
    assert num_cached == [-1, 0]


def test_commands_find_nothing_under_way(gptj_folder: Path) -> None:
    """A row that is parked, freed or read while a step runs on it would be another."""
    engine = engine_of(gptj_folder, ahead=True)
    params = SamplingParams(max_tokens=50, seed=1, ignore_eos=True)
    for name in ("a", "b"):
        engine.submit([7], params, request_id=name)
    for _ in range(4):
        engine.step()
    assert engine._running is not None
    engine.cancel("a")
    seen = []
    engine._commands.put(lambda: seen.append(engine._running) or [])
    outputs = engine.step() + engine.step()
    assert seen == [None]
    assert [out.finish_reason for out in outputs if out.request_id == "a"][-1] is FinishReason.ABORT


def test_a_fault_of_the_step_ahead_ends_its_requests(gptj_folder: Path) -> None:
    engine = engine_of(gptj_folder, ahead=True)
    engine.submit([7], SamplingParams(max_tokens=50, ignore_eos=True), request_id="a")
    run = engine._runner.run

    def failing(batch: Batch, *given: Any) -> Any:
        if batch.num_ahead:
            raise RuntimeError("broken")
        return run(batch, *given)

    engine._runner.run = failing  # type: ignore[method-assign]
    outputs = [out for _ in range(4) for out in engine.step()]
    assert outputs[-1].finish_reason is FinishReason.ERROR
    assert engine.pool.num_free == engine.pool.num_slots
    assert not engine.has_work()


def test_waiting_requests_start_as_soon_as_there_are_slots(gptj_folder: Path) -> None:
    """An engine that ran ahead for ever would never let them in."""
    engine = engine_of(gptj_folder, ahead=True, max_slots=1)
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    for name in ("a", "b"):
        engine.submit([7], params, request_id=name)
    for _ in range(40):
        engine.step()
    assert not engine.has_work()

"""Paused requests: slots for others, and the same tokens as without a pause."""

from dataclasses import replace
from pathlib import Path

import pytest

from cottention.engine import Engine, EngineConfig, FinishReason, Output, SamplingParams
from cottention.engine.scheduling.client import Client
from tests.engine.test_engine import LONG, check_all_ended, collect, ids_of

pytestmark = pytest.mark.every_session

PARAMS = SamplingParams(max_tokens=12, seed=3, ignore_eos=True)
PROMPT = [5, 6, 7]


def steps(engine: Engine, number: int, parts: dict[tuple[str, int], list[Output]]) -> None:
    for _ in range(number):
        for out in engine.step():
            parts.setdefault((out.request_id, out.choice), []).append(out)


def rest(engine: Engine, parts: dict[tuple[str, int], list[Output]]) -> None:
    for key, outputs in collect(engine).items():
        parts.setdefault(key, []).extend(outputs)


def test_a_pause_frees_the_slot_and_changes_no_token(gptj_folder: Path) -> None:
    engine = Engine(gptj_folder, EngineConfig(max_slots=1))
    alone = [engine.generate([PROMPT], PARAMS)[0].token_ids for PROMPT in ([5, 6, 7], [9])]
    parts: dict[tuple[str, int], list[Output]] = {}
    engine.submit([5, 6, 7], PARAMS, request_id="slow")
    steps(engine, 4, parts)
    engine.submit([9], PARAMS, request_id="other")
    steps(engine, 2, parts)
    assert ("other", 0) not in parts
    engine.pause("slow")
    steps(engine, 20, parts)
    assert ids_of(parts["other", 0]) == alone[1]
    assert len(parts["slow", 0]) == 6
    stats = engine.stats()
    assert (stats.num_running, stats.num_paused, stats.num_free_slots) == (0, 1, 1)
    assert not engine.has_work()
    engine.resume("slow")
    rest(engine, parts)
    assert ids_of(parts["slow", 0]) == alone[0]
    check_all_ended(engine, parts)


def test_who_goes_on_comes_before_those_that_have_not_begun(gptj_folder: Path) -> None:
    engine = Engine(gptj_folder, EngineConfig(max_slots=1))
    parts: dict[tuple[str, int], list[Output]] = {}
    for name in ("slow", "second", "third"):
        engine.submit(PROMPT, PARAMS, request_id=name)
    steps(engine, 2, parts)
    engine.pause("slow")
    steps(engine, 2, parts)
    engine.resume("slow")
    rest(engine, parts)
    assert list(parts) == [("slow", 0), ("second", 0), ("third", 0)]
    ends = [out.request_id for out in collect_ends(parts)]
    assert sorted(ends) == ["second", "slow", "third"]
    check_all_ended(engine, parts)


def collect_ends(parts: dict[tuple[str, int], list[Output]]) -> list[Output]:
    return [outputs[-1] for outputs in parts.values()]


def test_choices_that_have_ended_need_no_slot(engine: Engine) -> None:
    """Of four choices those that met a stop id are over; the others pause and go on."""
    params = SamplingParams(
        max_tokens=30, seed=1, n=4, ignore_eos=True, stop_token_ids=tuple(range(0, 100, 3))
    )
    engine.submit(PROMPT, params, request_id="alone")
    alone = {choice: ids_of(outputs) for (_, choice), outputs in collect(engine).items()}
    parts: dict[tuple[str, int], list[Output]] = {}
    engine.submit(PROMPT, params, request_id="slow")
    while not 0 < sum(bool(outputs[-1].finish_reason) for outputs in parts.values()) < 4:
        steps(engine, 1, parts)
    engine.pause("slow")
    steps(engine, 1, parts)
    assert engine.stats().num_free_slots == 4
    engine.resume("slow")
    rest(engine, parts)
    assert {choice: ids_of(outputs) for (_, choice), outputs in parts.items()} == alone
    check_all_ended(engine, parts)


@pytest.mark.parametrize("again", ["pause", "resume", "nothing"])
def test_every_order_of_verbs(engine: Engine, again: str) -> None:
    """Twice, of one that waits, is read, goes on, has ended or never was: nothing is lost."""
    parts: dict[tuple[str, int], list[Output]] = {}
    expected = engine.generate([PROMPT * 8], PARAMS)[0].token_ids
    for name in ("a", "b"):
        engine.submit(PROMPT * 8, PARAMS, request_id=name)
        engine.pause(name)
        engine.resume("nobody")
        engine.pause("nobody")
    for _ in range(100):
        for name in ("a", "b"):
            engine.pause(name)
            if again != "nothing":
                getattr(engine, again)(name)
            steps(engine, 1, parts)
            engine.resume(name)
            if again == "resume":
                engine.resume(name)
            elif again == "pause":
                engine.pause(name)
                engine.resume(name)
            steps(engine, 2, parts)
    rest(engine, parts)
    assert {ids_of(outputs) for outputs in parts.values()} == {expected}
    check_all_ended(engine, parts)


@pytest.mark.parametrize("verb", ["cancel", "close"])
def test_the_end_of_one_that_pauses(engine: Engine, verb: str) -> None:
    engine.submit(PROMPT, LONG, request_id="slow")
    for _ in range(4):
        engine.step()
    engine.pause("slow")
    assert engine.step() == []
    if verb == "cancel":
        engine.cancel("slow")
        outputs = engine.step()
    else:
        outputs = engine.close()
    assert [out.finish_reason for out in outputs] == [FinishReason.ABORT]
    assert engine.stats().num_paused == 0
    check_all_ended(engine, {})


def test_the_end_of_one_that_waits_to_go_on(gptj_folder: Path) -> None:
    engine = Engine(gptj_folder, EngineConfig(max_slots=1))
    engine.submit(PROMPT, LONG, request_id="slow")
    engine.step()
    engine.pause("slow")
    engine.submit(PROMPT, LONG, request_id="other")
    engine.step()
    engine.resume("slow")
    engine.step()
    assert engine.stats().num_waiting == 1
    engine.pause("slow")
    engine.step()
    assert (engine.stats().num_waiting, engine.stats().num_paused) == (0, 1)
    engine.resume("slow")
    engine.cancel("slow", FinishReason.TIMEOUT)
    assert engine.step()[0].finish_reason is FinishReason.TIMEOUT
    engine.cancel("other")
    engine.step()
    check_all_ended(engine, {})


@pytest.mark.every_attention
def test_a_pause_between_renewals_changes_no_token(gptj_folder: Path) -> None:
    """The spare row, in which the next state grows, waits with the other."""
    engine = Engine(gptj_folder, EngineConfig(max_slots=2, context_policy="renew"))
    window = engine.policies.window
    params = SamplingParams(max_tokens=3 * window, seed=3, ignore_eos=True)
    expected = engine.generate([PROMPT], params)[0].token_ids
    parts: dict[tuple[str, int], list[Output]] = {}
    engine.submit(PROMPT, params, request_id="slow")
    while engine.has_work():
        steps(engine, window // 5, parts)
        engine.pause("slow")
        engine.submit(PROMPT, PARAMS)
        steps(engine, 2, parts)
        engine.resume("slow")
        steps(engine, 15, parts)
    assert ids_of(parts["slow", 0]) == expected
    check_all_ended(engine, parts)


WHILE = SamplingParams(max_tokens=40, seed=3, ignore_eos=True)


def paused(engine: Engine, name: str, num_steps: int = 4, **more: int) -> list[Output]:
    """Begin a request and pause it; what else comes of that."""
    params = replace(WHILE, **more)
    engine.submit(PROMPT, params, request_id=name)
    for _ in range(num_steps):
        engine.step()
    engine.pause(name)
    return engine.step()


def reasons(outputs: list[Output]) -> list[tuple[str, FinishReason | None]]:
    return [(out.request_id, out.finish_reason) for out in outputs]


def test_past_the_bound_who_has_paused_longest_ends(gptj_folder: Path) -> None:
    """The others go on with the same tokens as alone."""
    engine = Engine(gptj_folder, EngineConfig(max_slots=1, max_paused_states=2))
    [expected] = engine.generate([PROMPT], WHILE)
    assert paused(engine, "a") == paused(engine, "b") == []
    assert reasons(paused(engine, "c")) == [("a", FinishReason.SLOW_READER)]
    stats = engine.stats()
    assert (stats.num_paused, stats.num_paused_states, stats.max_paused_states) == (2, 2, 2)
    assert stats.num_finished[FinishReason.SLOW_READER] == 1
    assert engine.pool.num_free == 1
    for name in ("a", "b", "c"):
        engine.resume(name)
    parts = collect(engine)
    assert [len(ids_of(parts[name, 0])) for name in "bc"] == [WHILE.max_tokens - 4] * 2
    assert all(expected.token_ids[4:] == ids_of(outputs) for outputs in parts.values())
    assert engine.stats().num_paused_states == 0
    check_all_ended(engine, parts)


def test_each_choice_counts_and_one_with_too_many_ends_alone(gptj_folder: Path) -> None:
    engine = Engine(gptj_folder, EngineConfig(max_slots=4, max_paused_states=3))
    assert paused(engine, "a") == paused(engine, "b") == []
    assert reasons(paused(engine, "two", n=2)) == [("a", FinishReason.SLOW_READER)]
    assert engine.stats().num_paused_states == 3
    assert reasons(paused(engine, "four", n=4)) == [("four", FinishReason.SLOW_READER)] * 4
    assert engine.stats().num_paused_states == 3
    assert reasons(paused(engine, "three", n=3)) == [
        ("b", FinishReason.SLOW_READER),
        ("two", FinishReason.SLOW_READER),
        ("two", FinishReason.SLOW_READER),
    ]
    assert engine.pool.num_free == 4
    engine.cancel("three")
    engine.step()
    check_all_ended(engine, {})


def test_a_resumed_request_is_not_ended_for_one_that_pauses(gptj_folder: Path) -> None:
    """It has been read. Its state counts, and so who pauses finds no room."""
    engine = Engine(gptj_folder, EngineConfig(max_slots=1, max_paused_states=1))
    assert paused(engine, "read") == []
    engine.submit(PROMPT, WHILE, request_id="slow")
    for _ in range(4):
        engine.step()
    engine.resume("read")
    engine.step()
    assert engine.stats().num_waiting == 1
    engine.pause("slow")
    outputs = engine.step()
    assert ("slow", FinishReason.SLOW_READER) in reasons(outputs)
    parts = collect(engine)
    assert parts["read", 0][-1].finish_reason is FinishReason.LENGTH
    check_all_ended(engine, parts)


def test_no_room_at_all(gptj_folder: Path) -> None:
    engine = Engine(gptj_folder, EngineConfig(max_slots=1, max_paused_states=0))
    assert reasons(paused(engine, "slow")) == [("slow", FinishReason.SLOW_READER)]
    check_all_ended(engine, {})


def test_the_default_limit_is_the_number_of_slots(gptj_folder: Path) -> None:
    assert Engine(gptj_folder, EngineConfig(max_slots=3)).stats().max_paused_states == 3


@pytest.mark.parametrize("num_steps", [1, 6])
def test_slots_that_another_client_gets_change_no_token(gptj_folder: Path, num_steps: int) -> None:
    """One request has every slot, and gives them up in its prompt or while it decodes."""
    engine = Engine(gptj_folder, EngineConfig(max_slots=2, max_batch_tokens=8))
    num_tokens = min(2 * engine.policies.window, 80)
    params = SamplingParams(max_tokens=num_tokens, seed=3, ignore_eos=True, n=2)
    prompt = PROMPT * 10
    engine.submit(prompt, params, request_id="alone")
    alone = {choice: ids_of(outputs) for (_, choice), outputs in collect(engine).items()}
    other = [engine.generate([[9]], PARAMS)[0].token_ids]
    parts: dict[tuple[str, int], list[Output]] = {}
    engine.submit(prompt, params, request_id="hog", client=Client("hog"))
    steps(engine, num_steps, parts)
    engine.submit([9], PARAMS, request_id="other", client=Client("other"))
    steps(engine, 1, parts)
    stats = engine.stats()
    assert (stats.num_preemptions, stats.num_preempted_states) == (1, 2)
    assert (stats.num_paused, stats.num_paused_states) == (0, 0)
    rest(engine, parts)
    assert ids_of(parts["other", 0]) == other[0]
    assert {choice: ids_of(parts["hog", choice]) for choice in alone} == alone
    assert engine.stats().num_preempted_states == 0
    check_all_ended(engine, parts)


def test_a_preempted_request_may_pause_and_end(gptj_folder: Path) -> None:
    engine = Engine(gptj_folder, EngineConfig(max_slots=1, max_paused_states=1))
    for verb in ("pause", "cancel"):
        parts: dict[tuple[str, int], list[Output]] = {}
        engine.submit(PROMPT, LONG, request_id="hog", client=Client("hog"))
        steps(engine, 4, parts)
        engine.submit(PROMPT, PARAMS, request_id="other", client=Client("other"))
        steps(engine, 1, parts)
        assert engine.stats().num_preempted_states == 1
        getattr(engine, verb)("hog")
        steps(engine, 1, parts)
        stats = engine.stats()
        assert (stats.num_preempted_states, stats.num_paused_states) == (0, verb == "pause")
        engine.cancel("hog")
        rest(engine, parts)
        assert len(ids_of(parts["other", 0])) == PARAMS.max_tokens
        check_all_ended(engine, parts)

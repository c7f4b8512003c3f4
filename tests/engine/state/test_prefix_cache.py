"""Prompts that come again: less is read, and nothing that is said changes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cottention.engine import Engine, EngineConfig, FinishReason, Output, SamplingParams
from cottention.engine.scheduling.prefill_stops import BLOCK, CacheUse

pytestmark = pytest.mark.every_session

SEEDED = SamplingParams(max_tokens=6, ignore_eos=True, seed=11)


@pytest.fixture
def engine(gptj_folder: Path) -> Engine:
    return Engine(
        gptj_folder, EngineConfig(max_slots=4, max_batch_tokens=100, context_policy="exact")
    )


def say(
    engine: Engine, ids: Sequence[int], params: SamplingParams = SEEDED, scope: str | None = "a"
) -> tuple[list[int], int]:
    """What is said, and how many ids of the prompt were spared."""
    name = engine.submit(ids, params, cache=None if scope is None else CacheUse(scope))
    outputs: list[Output] = []
    while engine.has_work():
        outputs += engine.step()
    assert engine.pool.num_free == engine.pool.num_slots
    own = [out for out in outputs if out.request_id == name and out.choice == 0]
    assert own[-1].finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
    return [token_id for out in own for token_id in out.token_ids], own[-1].num_cached


def ids_from(seed: int, num: int) -> list[int]:
    return torch.randint(5, 200, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_warm_and_cold_answers_are_equal(engine: Engine) -> None:
    prompt = ids_from(1, 3 * BLOCK + 17)
    cold, spared = say(engine, prompt, scope=None)
    assert spared == 0
    assert say(engine, prompt) == (cold, 0)
    assert say(engine, prompt) == (cold, 3 * BLOCK)
    for cut in (1, BLOCK, BLOCK + 1, 2 * BLOCK + 5):
        other = prompt[:-cut] + ids_from(cut, 30)
        expected, _ = say(engine, other, scope=None)
        said, spared = say(engine, other)
        assert said == expected
        assert spared >= BLOCK * ((len(prompt) - cut) // BLOCK) - BLOCK


def test_a_resent_conversation_reads_only_what_is_new(engine: Engine) -> None:
    conversation: list[int] = []
    num_new = 0
    for turn in range(20):
        new = ids_from(turn, 40)
        conversation += new
        num_new += len(new)
        before = engine.stats().num_prompt_tokens
        said, spared = say(engine, conversation)
        assert engine.stats().num_prompt_tokens - before == len(conversation) - spared
        conversation += said
        num_new += len(said)
    assert engine.stats().num_prompt_tokens <= 1.1 * num_new


def test_another_scope_finds_nothing(engine: Engine) -> None:
    prompt = ids_from(2, 2 * BLOCK)
    say(engine, prompt, scope="a")
    assert say(engine, prompt, scope="b")[1] == 0
    assert say(engine, prompt, scope="a")[1] > 0


def test_several_choices_share_what_was_read(engine: Engine) -> None:
    prompt = ids_from(3, 2 * BLOCK + 3)
    params = replace(SEEDED, n=3)
    cold, _ = say(engine, prompt, params, scope=None)
    say(engine, prompt, params)
    assert say(engine, prompt, params) == (cold, 2 * BLOCK)


def test_scores_are_read_whole(engine: Engine) -> None:
    prompt = ids_from(4, 2 * BLOCK)
    say(engine, prompt)
    name = engine.submit(prompt, replace(SEEDED, prompt_logprobs=0), cache=CacheUse("a"))
    outputs: list[Output] = []
    while engine.has_work():
        outputs += engine.step()
    [told] = [out.prompt_logprobs for out in outputs if out.prompt_logprobs is not None]
    assert outputs[0].request_id == name
    assert len(told) == len(prompt)


def test_no_budget_keeps_nothing(gptj_folder: Path) -> None:
    engine = Engine(gptj_folder, EngineConfig(max_slots=2, prefix_cache_bytes=0))
    prompt = ids_from(5, 2 * BLOCK)
    say(engine, prompt)
    assert say(engine, prompt)[1] == 0
    assert engine.stats().prefix_cache.nbytes == 0


def test_a_cancelled_request_leaves_what_it_read(engine: Engine) -> None:
    prompt = ids_from(6, 3 * BLOCK)
    name = engine.submit(prompt, SEEDED, cache=CacheUse("a"))
    for _ in range(2):  # 100 ids, then 28 up to where a state is kept
        engine.step()
    engine.cancel(name)
    while engine.has_work():
        engine.step()
    expected, _ = say(engine, prompt, scope=None)
    assert say(engine, prompt) == (expected, 2 * BLOCK)

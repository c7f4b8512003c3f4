"""Prompts that begin alike: ids that are read, and the time to the first token.

One prompt has a beginning that 63 others share, each with a tail of its own. They come one after
the other, without the prefix cache and with it; answers are compared.
"""

import random
import statistics
import time
from collections.abc import Sequence

from benchmarks.common import Report, run, show
from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.scheduling.prefill_stops import CacheUse

SHARED, NUM_PROMPTS, TAIL = 2000, 64, 30
ANSWER = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


def measure(quick: bool) -> Report:
    """A row for each context policy; quick has fewer prompts."""
    prompts = _prompts(16 if quick else NUM_PROMPTS)
    rows = [_row(policy, prompts) for policy in ("exact", "renew")]
    title = f"{len(prompts)} prompts: {SHARED:,} ids in common, {TAIL} of their own, float32"
    show(title, rows)
    return {"shared_prefix": rows}


def _prompts(num: int) -> list[list[int]]:
    chance = random.Random(1)
    shared = [chance.randrange(300, 3000) for _ in range(SHARED)]
    return [shared + [chance.randrange(300, 3000) for _ in range(TAIL)] for _ in range(num)]


def _row(policy: str, prompts: Sequence[Sequence[int]]) -> Report:
    answers, seconds, read = [], [], []
    for cache in (None, CacheUse("benchmark")):
        engine = Engine(config=EngineConfig(max_slots=4, context_policy=policy))
        engine.generate(["warm up"], ANSWER)
        before = engine.stats().num_prompt_tokens
        said, took, num_first = [], [], 0
        for prompt in prompts:
            ids, first_token = _ask(engine, prompt, cache)
            said.append(ids)
            took.append(first_token)
            num_first = num_first or engine.stats().num_prompt_tokens - before
        answers.append(said)
        seconds.append(took)
        read.append((num_first, engine.stats().num_prompt_tokens - before))
    if answers[0] != answers[1]:
        raise SystemExit("answers with and without the cache differ: nothing is reported")
    (num_first, num_cold), (_, num_warm) = read
    cold, warm = seconds
    return {
        "policy": policy,
        "ids read cold": num_cold,
        "ids read warm": num_warm,
        "warm / (first + tails)": num_warm / (num_first + TAIL * (len(prompts) - 1)),
        "ms cold": 1e3 * statistics.median(cold),
        "ms warm, first": 1e3 * warm[0],
        "ms warm, second": 1e3 * warm[1],
        "ms warm, others": 1e3 * statistics.median(warm[2:]),
    }


def _ask(engine: Engine, prompt: Sequence[int], cache: CacheUse | None) -> tuple[list[int], float]:
    """The answer, and the seconds to its first token."""
    begin, first = time.perf_counter(), 0.0
    engine.submit(prompt, ANSWER, cache=cache)
    ids: list[int] = []
    while engine.has_work():
        ids += [token_id for out in engine.step() for token_id in out.token_ids]
        if ids and not first:
            first = time.perf_counter() - begin
    return ids, first


if __name__ == "__main__":
    run(__doc__ or "", measure)

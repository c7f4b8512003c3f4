"""Cost of sampling parameters: a decode step of many streams with the same parameters, vs greedy.

The streams of each case are choices of one prompt in an engine of their own. The engines take turns
of a few steps, so that other load affects all alike.
"""

import statistics
import time
from typing import Any

from benchmarks.common import Report, run, show
from cottention.engine import Engine, EngineConfig, SamplingParams

GREEDY = "greedy"
CASES: dict[str, dict[str, Any]] = {
    GREEDY: {"temperature": 0},
    "temperature 1": {},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50": {"top_k": 50},
    "repetition_penalty 1.1": {"repetition_penalty": 1.1},
    "frequency_penalty 0.5": {"frequency_penalty": 0.5},
    "logprobs 5": {"logprobs": 5},
    "logit_bias of 100": {"logit_bias": dict.fromkeys(range(100, 200), -1.0)},
}
STREAMS = (1, 64)
PROMPT_IDS = 600
STEPS_PER_TURN = 10


def measure(quick: bool) -> Report:
    """Median time of a step for each set of parameters."""
    check()
    rows = [row for streams in STREAMS for row in _rows(streams, num_turns=3 if quick else 20)]
    show("Decode step by sampling parameters", rows)
    return {"sampling": rows}


def check() -> None:
    """Raise AssertionError unless top_k 1 gives the greedy tokens."""
    engine = Engine(config=EngineConfig(max_slots=2))
    params = SamplingParams(max_tokens=40, ignore_eos=True, top_k=1)
    greedy = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0)
    first, second = (engine.generate(["def "], each)[0] for each in (params, greedy))
    assert first.token_ids == second.token_ids, "top_k 1 is not greedy"


def _rows(streams: int, num_turns: int) -> list[dict[str, object]]:
    engines = {name: _engine_with(params, streams) for name, params in CASES.items()}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(num_turns):
        for name, engine in engines.items():
            engine.step()
            times[name] += [_second(engine) for _ in range(STEPS_PER_TURN)]
    medians = {name: statistics.median(each) for name, each in times.items()}
    return [
        {
            "streams": streams,
            "parameters": name,
            "ms/step": 1e3 * median,
            "vs greedy": median / medians[GREEDY],
        }
        for name, median in medians.items()
    ]


def _second(engine: Engine) -> float:
    start = time.perf_counter()
    engine.step()
    return time.perf_counter() - start


def _engine_with(extra: dict[str, Any], streams: int) -> Engine:
    """An engine whose streams decode from the next step on."""
    engine = Engine(config=EngineConfig(max_slots=streams))
    prompt = [1 + i % (engine.tokenizer.num_ids - 1) for i in range(PROMPT_IDS)]
    params = {"n": streams, "max_tokens": 100_000, "seed": 1, "ignore_eos": True, **extra}
    engine.submit(prompt, SamplingParams(**params))
    while not engine.stats().num_generated_tokens:
        engine.step()
    return engine


if __name__ == "__main__":
    run(__doc__, measure)

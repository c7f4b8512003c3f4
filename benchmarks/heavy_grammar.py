"""Heavy grammars of one key beside the free text of another: how long the other's steps take.

The grammar's masks take long, some longer than a hundred steps. Both keys' requests run in one
engine; the steps in which the other key gets its tokens are timed, with and without the grammars.
"""

import statistics
import time

from benchmarks.common import Report, percentile, run, show
from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.scheduling.client import Client
from cottention.engine.structured_output import TextStructure

DEPTH = 12
CHAIN = "\n".join(f"r{i}: r{i + 1} r{i + 1} | r{i + 1}" for i in range(DEPTH))
GRAMMAR = f'start: r0\n{CHAIN}\nr{DEPTH}: "a" | "b" | '
"""Every text of a and b in many ways."""

HEAVY, OTHER = Client("heavy"), Client("other")
NUM_HEAVY, NUM_OTHER = 8, 8


def measure(quick: bool) -> Report:
    """Milliseconds between the tokens of the other key."""
    rows = [_gaps(num_heavy, 100 if quick else 400) for num_heavy in (0, 1, NUM_HEAVY)]
    show(f"{NUM_OTHER} free streams beside heavy grammars of another key", rows)
    return {"heavy_grammar": rows}


def _gaps(num_heavy: int, num_tokens: int) -> Report:
    engine = Engine(config=EngineConfig(max_slots=NUM_HEAVY + NUM_OTHER))
    prompt = engine.tokenizer.encode("x = ")
    heavy = SamplingParams(
        structured=TextStructure("grammar", GRAMMAR), max_tokens=2048, seed=1, temperature=2.0
    )
    for _ in range(num_heavy):
        engine.submit(prompt, heavy, client=HEAVY)
    free = SamplingParams(max_tokens=num_tokens, seed=1, ignore_eos=True)
    names = {engine.submit(prompt, free, client=OTHER) for _ in range(NUM_OTHER)}
    gaps: list[float] = []
    num_heavy_tokens, last = 0, time.perf_counter()
    while names:
        outputs = engine.step()
        now = time.perf_counter()
        mine = [out for out in outputs if out.request_id in names]
        if mine:
            gaps.append(1000 * (now - last))
            last = now
        num_heavy_tokens += len(outputs) - len(mine)
        names -= {out.request_id for out in mine if out.finish_reason}
    engine.close()
    return {
        "heavy streams": num_heavy,
        "median ms": statistics.median(gaps),
        "p99 ms": percentile(gaps, 99),
        "longest ms": max(gaps),
        "heavy tokens": num_heavy_tokens,
    }


if __name__ == "__main__":
    run(__doc__, measure)

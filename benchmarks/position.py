"""Time per token at position 100 and at position 50,000: the ratio is the promise.

Two streams are brought to their positions and then take steps by turns, so that whatever else the
machine does falls on both.
"""

import statistics
import time

from benchmarks.common import Report, run, show
from engine import Engine, EngineConfig, SamplingParams

NEAR, FAR = 100, 50_000
BATCHES = (1, 8, 64)


def measure(quick: bool) -> Report:
    """Median seconds of a decode step with all rows at one position, for several batch sizes."""
    rows = [_ratio(batch, 150 if quick else 1_000) for batch in BATCHES[: 2 if quick else 3]]
    show("Time per decode step, by position", rows)
    return {"position": rows}


def _ratio(batch: int, num_steps: int) -> dict[str, object]:
    near, far = (_engine_at(position, batch) for position in (NEAR, FAR))
    times: dict[int, list[float]] = {NEAR: [], FAR: []}
    for _ in range(num_steps):
        for position, engine in ((NEAR, near), (FAR, far)):
            start = time.perf_counter()
            engine.step()
            times[position].append(time.perf_counter() - start)
    near_ms, far_ms = (1e3 * statistics.median(times[p]) for p in (NEAR, FAR))
    return {
        "streams": batch,
        f"ms at {NEAR:,}": near_ms,
        f"ms at {FAR:,}": far_ms,
        "ratio": far_ms / near_ms,
    }


def _engine_at(position: int, batch: int) -> Engine:
    """An engine whose `batch` streams all stand at `position` and decode from the next step on.

    One prompt is read and copied to all choices of one request.
    """
    engine = Engine(config=EngineConfig(max_slots=batch))
    prompt = [1 + i % (engine.tokenizer.num_ids - 1) for i in range(position)]
    params = SamplingParams(n=batch, max_tokens=100_000, temperature=0, ignore_eos=True)
    engine.submit(prompt, params)
    while not engine.stats().num_generated_tokens:
        engine.step()
    return engine


if __name__ == "__main__":
    run(__doc__, measure)

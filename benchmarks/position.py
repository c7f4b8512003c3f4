"""Time per token at large positions compared with small ones: it should not depend on the position.

Uses the exact recurrence. Streams reach positions 100 and 50,000 by prefilling a prompt of that
length; positions 1,000 and 1,000,000 are set. The engines take steps in turn, so that other load
affects both alike.
"""

import statistics
import time

from benchmarks.common import Report, run, show
from cottention.engine import Engine, EngineConfig, SamplingParams

PREFILLED = 100, 50_000
SET = 1_000, 1_000_000
BATCHES = (1, 8, 64)


def measure(quick: bool) -> Report:
    """Median time of a decode step with all rows at one position, for several batch sizes."""
    batches, num_steps = BATCHES[: 2 if quick else 3], 150 if quick else 1_000
    read = [_ratio(PREFILLED, [_engine_at(p, n) for p in PREFILLED], n, num_steps) for n in batches]
    show("Time per decode step, by position (prefilled)", read)
    moved = [_ratio(SET, [_engine_set_to(p, n) for p in SET], n, num_steps) for n in batches]
    show("Time per decode step, by position (set)", moved)
    return {"position": read, "position_set": moved}


def _ratio(
    positions: tuple[int, int], engines: list[Engine], batch: int, num_steps: int
) -> dict[str, object]:
    times: dict[int, list[float]] = {position: [] for position in positions}
    for _ in range(num_steps):
        for position, engine in zip(positions, engines, strict=True):
            start = time.perf_counter()
            engine.step()
            times[position].append(time.perf_counter() - start)
    near_ms, far_ms = (1e3 * statistics.median(times[position]) for position in positions)
    return {
        "streams": batch,
        f"ms at {positions[0]:,}": near_ms,
        f"ms at {positions[1]:,}": far_ms,
        "ratio": far_ms / near_ms,
    }


def _engine_set_to(position: int, batch: int) -> Engine:
    """As `_engine_at`, with the position set on streams that have just begun."""
    engine = _engine_at(1, batch)
    for choice in engine._scheduler._decoding:
        choice.position = position
    return engine


def _engine_at(position: int, batch: int) -> Engine:
    """An engine whose `batch` streams are at `position` and decode from the next step on.

    One prompt is prefilled for all choices of one request.
    """
    engine = Engine(config=EngineConfig(max_slots=batch, context_policy="exact"))
    prompt = [1 + i % (engine.tokenizer.num_ids - 1) for i in range(position)]
    params = SamplingParams(n=batch, max_tokens=100_000, temperature=0, ignore_eos=True)
    engine.submit(prompt, params)
    while not engine.stats().num_generated_tokens:
        engine.step()
    return engine


if __name__ == "__main__":
    run(__doc__, measure)

"""Time per token at far positions beside near ones: the ratio is the promise.

As the paper has it (`exact`). Streams are brought to position 100 and 50,000 by reading a prompt of
that length; positions 1,000 and 1,000,000 are set. Both then take steps by turns, so that whatever
else the machine does falls on both.
"""

import statistics
import time

from benchmarks.common import Report, run, show
from cottention.engine import Engine, EngineConfig, SamplingParams

READ = 100, 50_000
SET = 1_000, 1_000_000
BATCHES = (1, 8, 64)


def measure(quick: bool) -> Report:
    """Median seconds of a decode step with all rows at one position, for several batch sizes."""
    batches, num_steps = BATCHES[: 2 if quick else 3], 150 if quick else 1_000
    read = [_ratio(READ, [_engine_at(p, n) for p in READ], n, num_steps) for n in batches]
    show("Time per decode step, by position", read)
    moved = [_ratio(SET, [_engine_set_to(p, n) for p in SET], n, num_steps) for n in batches]
    show("Time per decode step, positions set", moved)
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
    """As `_engine_at`, but the position is written into streams that have just begun."""
    engine = _engine_at(1, batch)
    for choice in engine._scheduler._decoding:
        choice.position = position
    return engine


def _engine_at(position: int, batch: int) -> Engine:
    """An engine whose `batch` streams all stand at `position` and decode from the next step on.

    One prompt is read and copied to all choices of one request.
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

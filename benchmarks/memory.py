"""Memory of one stream as it grows, compared with the KV cache of a softmax model.

Uses the exact recurrence; renewal adds one row per slot, whatever the age. The pool's size is
compared with `StateSpec` exactly; resident memory of the process is read while one stream runs from
token 1,000 to token 50,000.
"""

import os
from pathlib import Path

import matplotlib as mpl
import psutil
from matplotlib import pyplot

from benchmarks.common import Report, run, show
from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.models.gptj.config import GPTJConfig

FIRST = 1_000
PLOT = Path("build") / "memory.png"
BYTES_PER_ELEMENT = 4


def measure(quick: bool) -> Report:
    """Resident bytes at several ages of one stream; table and plot."""
    last = 5_000 if quick else 50_000
    engine = Engine(config=EngineConfig(max_slots=64, context_policy="exact"))
    ages = sorted({FIRST, *range(last // 10, last + 1, last // 10)})
    resident = _resident_by_age(engine, ages)
    rows = [_row(engine.model_config, age, resident[FIRST], resident[age]) for age in ages]
    show("Memory of one stream, by number of tokens", rows)
    pool = _pool(engine)
    show("State pool", [pool])
    _draw(engine, ages, resident)
    return {"memory": rows, "pool": pool, "spread_mib": _spread(resident), "plot": str(PLOT)}


def _resident_by_age(engine: Engine, ages: list[int]) -> dict[int, int]:
    """Resident bytes of this process by the number of generated tokens."""
    process = psutil.Process(os.getpid())
    params = SamplingParams(max_tokens=ages[-1], seed=1, ignore_eos=True)
    resident = {}
    for count, _ in enumerate(engine.stream("def ", params), start=1):
        if count in ages:
            resident[count] = process.memory_info().rss
    return resident


def kv_cache_bytes(config: GPTJConfig, tokens: int) -> int:
    """Bytes of the float32 keys and values of a softmax model of this shape."""
    return 2 * config.n_layer * config.n_embd * BYTES_PER_ELEMENT * tokens


def _row(config: GPTJConfig, age: int, at_first: int, resident: int) -> dict[str, object]:
    return {
        "tokens": age,
        "resident MiB": resident / 2**20,
        "growth MiB": (resident - at_first) / 2**20,
        "softmax cache MiB": kv_cache_bytes(config, age) / 2**20,
    }


def _pool(engine: Engine) -> dict[str, object]:
    slots, each = engine.pool.num_slots, engine.spec.bytes_per_slot
    if engine.pool.nbytes != slots * each:
        raise SystemExit(f"the pool has {engine.pool.nbytes} bytes, not {slots} x {each}")
    return {
        "slots": slots,
        "bytes per slot": each,
        "pool bytes": engine.pool.nbytes,
        "equal to StateSpec x slots": "yes",
    }


def _spread(resident: dict[int, int]) -> float:
    return (max(resident.values()) - min(resident.values())) / 2**20


def _draw(engine: Engine, ages: list[int], resident: dict[int, int]) -> None:
    """Plot both against the number of tokens."""
    mpl.use("Agg")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    cache = [kv_cache_bytes(engine.model_config, age) / 2**20 for age in ages]
    state = engine.spec.bytes_per_slot / 2**20
    grown = [state + (resident[age] - resident[FIRST]) / 2**20 for age in ages]
    axes.plot(ages, cache, label="softmax KV cache of the same shape (computed)")
    axes.plot(ages, grown, marker="o", label="Cottention state + growth of the process (measured)")
    axes.set(xlabel="tokens in the stream", ylabel="MiB", title="Memory of one stream, float32")
    axes.legend()
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    run(__doc__, measure)

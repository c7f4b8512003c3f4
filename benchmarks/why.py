"""The picture of README: memory of one conversation, and time of its next token, by its length.

One stream of the shipped model runs to token 30,000, as it is served. At some lengths the growth of
the process's memory is read, and the median time of a token is taken over one window of renewals.
In the same process, at the same lengths, softmax attention alone is timed: torch's own, for one
token over keys and values of the same layers and heads, whose bytes are those of the tensors. All
times are processor time of one thread, which other work on the machine changes little.

The figures are kept in docs/why.json and drawn as docs/why.svg; `make report` draws them again.
"""

import json
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
import psutil
import torch
from matplotlib import pyplot
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.common import Report, machine, run, show, write_json
from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.models.gptj.config import GPTJConfig

FIGURES = Path("docs") / "why.json"
PICTURE = FIGURES.with_suffix(".svg")
LENGTHS = (1_000, 3_000, 5_000, 10_000, 15_000, 20_000, 25_000, 30_000)
NUM_TIMED = 768
"""Tokens from one renewal of the state to the next."""


def measure(quick: bool) -> Report:
    """Bytes and milliseconds at each length; the full form also keeps and draws them."""
    engine = Engine(config=EngineConfig(max_slots=1, threads=1))
    rows = list(_rows(engine, LENGTHS[:2] if quick else LENGTHS))
    show("One conversation, by its length", rows)
    report = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "rows": rows}
    if not quick:
        write_json(FIGURES, report)
        draw()
    return {"why": report}


def _rows(engine: Engine, lengths: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    process = psutil.Process(os.getpid())
    stream = engine.stream("def ", SamplingParams(max_tokens=lengths[-1], seed=1, ignore_eos=True))
    times: deque[float] = deque(maxlen=NUM_TIMED)
    _median_ms(_attention(*_cache(engine.model_config, 1)))  # what torch allocates once
    at_first, slot = 0, engine.spec.bytes_per_slot
    last = time.process_time()
    for count, _ in enumerate(stream, start=1):
        now = time.process_time()
        times.append(now - last)
        if count in lengths:
            resident = process.memory_info().rss
            at_first = at_first or resident
            keys, values = _cache(engine.model_config, count)
            attend = _attention(keys, values)
            yield {
                "tokens": count,
                "state and growth MiB": (slot + resident - at_first) / 2**20,
                "ms per token": 1e3 * statistics.median(times),
                "softmax cache MiB": (keys.nbytes + values.nbytes) / 2**20,
                "softmax attention alone, ms per token": _median_ms(attend),
            }
            del keys, values, attend
        last = time.process_time()


def _cache(config: GPTJConfig, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [L, 1, H, T, D] of a softmax model of this shape."""
    head = config.n_embd // config.n_head
    shape = config.n_layer, 1, config.n_head, tokens, head
    return torch.randn(shape), torch.randn(shape)


def _attention(keys: torch.Tensor, values: torch.Tensor) -> Callable[[], None]:
    queries = torch.randn_like(keys[:, :, :, :1])

    def attend() -> None:
        for q, k, v in zip(queries, keys, values, strict=True):
            scaled_dot_product_attention(q, k, v)

    return attend


def _median_ms(work: Callable[[], None]) -> float:
    times = []
    for _ in range(15):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


def draw() -> None:
    """Two panels from the figures that are kept."""
    report = json.loads(FIGURES.read_text(encoding="utf-8"))
    rows = report["rows"]
    tokens = [row["tokens"] for row in rows]
    mpl.use("Agg")
    mpl.rcParams |= {"svg.hashsalt": "why", "svg.fonttype": "path", "font.size": 10}
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axes, title, ours, softmax, label in (
        (
            panels[0],
            "Memory of one conversation, MiB",
            "state and growth MiB",
            "softmax cache MiB",
            "key-value cache of the same shape",
        ),
        (
            panels[1],
            "Its next token, milliseconds of one thread",
            "ms per token",
            "softmax attention alone, ms per token",
            "softmax attention alone",
        ),
    ):
        axes.plot(tokens, [row[softmax] for row in rows], "--", color="#b3541e", label=label)
        axes.plot(tokens, [row[ours] for row in rows], "o-", color="#1e6fb3", label="this server")
        axes.set(title=title, xlabel="tokens in the conversation", ylim=(0, None))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left")
    figure.savefig(PICTURE, metadata={"Date": None})
    pyplot.close(figure)
    print(PICTURE)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run(__doc__, measure)

"""The plots of docs/quality.md, its tables of small runs, and README's picture.

Plots: bits per byte by position up to 64k, and memory by position. Tables: `benchmarks/papers`.

Figures are kept in docs/endless.json. --measure MODEL ("default" or a model folder) first scores a
model on long held-out text and adds its figures: exact and renewed, or for a softmax model with a
sliding window.
"""

import argparse
import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib import pyplot

from benchmarks import long_context, why
from benchmarks.common import machine, show, write_json
from benchmarks.held_out import LongText, load
from benchmarks.memory import kv_cache_bytes
from benchmarks.papers import tables
from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.model_folder import DEFAULT_MODEL
from cottention.engine.models.registry import read_config

DOCS = Path("docs")
FIGURES = DOCS / "endless.json"
LENGTH = 65_536
NUM_STREAMS = 4
MEMORY_AT = [2**power for power in range(6, 17)]


def main() -> None:
    """Measure the given models, then plot all figures and write the tables."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--measure", nargs="*", default=[], metavar="MODEL")
    options.add_argument("--streams", type=int, default=NUM_STREAMS, help="number of long streams")
    options.add_argument("--length", type=int, default=LENGTH, help="tokens per stream")
    arguments = options.parse_args()
    for name in arguments.measure:
        _measure(name, arguments.streams, arguments.length)
    series = _read()
    show("Bits per byte by position", [_row(name, one) for name, one in series.items()])
    mpl.use("Agg")
    _draw_quality(series, DOCS / "endless.png")
    _draw_memory(DOCS / "growth.png")
    why.draw()
    tables.update()


def _read() -> dict[str, Any]:
    if not FIGURES.is_file():
        raise SystemExit(f"{FIGURES} has no figures yet: use --measure default")
    series: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8"))
    return series


def _measure(name: str, num_streams: int, length: int) -> None:
    """Add the series of a model to the figures, each as soon as it is measured."""
    folder = DEFAULT_MODEL if name == "default" else Path(name)
    model, text = load(folder), LongText.held_out(folder)
    ways = _ways(model.config)
    for how, bits in long_context.bits_by_position(model, text, ways, num_streams, length):
        series = _read() if FIGURES.is_file() else {}
        series[f"{name if name == 'default' else folder.name}, {how}"] = {
            "attention": model.config.attention_type,
            "window": model.config.window,
            "streams": num_streams,
            "text_tokens": len(text.ids),
            "machine": machine(),
            "bits_per_byte": {place: asdict(each) for place, each in bits.items()},
        }
        write_json(FIGURES, series)


def _ways(config: GPTJConfig) -> dict[str, long_context.Nats]:
    if config.attention_type == "softmax":
        return {"sliding window": long_context.sliding}
    kept = config.window // long_context.KEPT_PART
    ways: dict[str, long_context.Nats] = {
        "renewed": functools.partial(long_context.renewed, kept=kept)
    }
    if config.max_exact_length is None:
        ways["exact"] = long_context.exact
    return ways


def _row(name: str, one: dict[str, Any]) -> dict[str, object]:
    bits = one["bits_per_byte"]
    return {"model": name, **{place: f"{each['level']:.3f}" for place, each in bits.items()}}


def _draw_quality(series: dict[str, Any], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, one in series.items():
        stops = [int(key.split("-")[1]) for key in one["bits_per_byte"]]
        style = {"exact": ":", "renewed": "-"}.get(name.split(", ")[1], "--")
        label = f"{name} (window {one['window']:,})"
        levels = [each["level"] for each in one["bits_per_byte"].values()]
        axes.plot(stops, levels, style, marker="o", ms=3, label=label)
    axes.set_xscale("log", base=2)
    borders = long_context.BORDERS[1:]
    axes.set_xticks(borders, [f"{border:,}" for border in borders])
    axes.set(xlabel="tokens in the stream, up to", ylabel="bits per byte of held-out code")
    axes.tick_params(axis="x", labelrotation=30)
    axes.legend(fontsize="small")
    _save(figure, path)


def _draw_memory(path: Path) -> None:
    """Computed for the shape of the default model in float32.

    The spare is the row in which renewal prepares the next state.
    """
    config = read_config(DEFAULT_MODEL)
    state = config.state_spec().bytes_per_slot / 2**20
    cache = [kv_cache_bytes(config, tokens) / 2**20 for tokens in MEMORY_AT]
    sliding = [min(each, kv_cache_bytes(config, config.window) / 2**20) for each in cache]
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    axes.plot(MEMORY_AT, cache, label="softmax, all keys and values")
    axes.plot(MEMORY_AT, sliding, "--", label=f"softmax, sliding window of {config.window:,}")
    axes.plot(MEMORY_AT, [2 * state] * len(MEMORY_AT), label="Cottention, the state and its spare")
    axes.plot(MEMORY_AT, [state] * len(MEMORY_AT), ":", label="Cottention, exact: the state")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(MEMORY_AT, [f"{tokens:,}" for tokens in MEMORY_AT])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(axis="x", labelrotation=30)
    axes.set(xlabel="tokens in the stream", ylabel="MiB", title="Memory of one stream, float32")
    axes.legend(fontsize="small")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(path)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()

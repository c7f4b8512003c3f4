"""Bits per byte of a model by the type of its weights and by position, as the server computes them.

Held-out code in windows of the trained length, each from a zero state. Needs no quiet machine.
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Report, machine, parser, show, write_json
from benchmarks.held_out import LongText
from benchmarks.long_context import BORDERS
from benchmarks.shapes import weight_type
from cottention.engine import ops
from cottention.engine.models.checkpoint import load_model
from cottention.engine.models.model_folder import DEFAULT_MODEL
from cottention.engine.models.recurrence import Recurrence
from cottention.engine.models.registry import family_of, read_config
from cottention.engine.state.pool import StatePool

KINDS = ("float32", "bfloat16", "int8")


def main() -> None:
    """Parse, measure, write JSON."""
    options = parser(__doc__)
    options.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="a model folder")
    options.add_argument("--windows", type=int, help="as many, evenly spaced (default: 64)")
    arguments = options.parse_args()
    windows = arguments.windows or (8 if arguments.quick else 64)
    figures = measure(arguments.model, windows)
    if arguments.json:
        write_json(arguments.json, {"machine": machine(), **figures})


@torch.inference_mode()
def measure(folder: Path, num_windows: int) -> Report:
    """A table of bits per byte: a row for each type of weights."""
    config, text = read_config(folder), LongText.held_out(folder)
    assert config.window is not None
    borders = [border for border in BORDERS if border <= config.window]
    rows: list[dict[str, object]] = []
    for kind in KINDS:
        dtype, storage = weight_type(kind)
        with ops.weight_storage(storage):
            weights = load_model(folder, config, dtype)
            served: Any = family_of(config).implementation().serve(weights, "cpu")
        nats, sizes = torch.zeros(2, config.window, dtype=torch.float64)
        for _, ids in text.streams(num_windows, config.window):
            nats += _nats(served, ids)
            sizes += text.token_bytes[ids[1:]]
        bits = nats / math.log(2)
        by_place = {f"{a}-{b}": _per_byte(bits[a:b], sizes[a:b]) for a, b in pairwise(borders)}
        rows.append({"weights": kind, **by_place, "all": _per_byte(bits, sizes)})
    tokens = num_windows * config.window
    shown = [{name: _digits(value) for name, value in row.items()} for row in rows]
    show(f"Bits per byte of {folder.name} by position, {tokens:,} tokens", shown)
    return {"weight_types": rows, "tokens": tokens}


def _per_byte(bits: Tensor, sizes: Tensor) -> float:
    return float(bits.sum() / sizes.sum())


def _digits(value: object) -> object:
    return f"{value:.4f}" if isinstance(value, float) else value


def _nats(served: Any, ids: Tensor) -> Tensor:
    """ids [T + 1] → −ln p of the last T, from a zero state."""
    count = len(ids) - 1
    pool = StatePool(served.config.state_spec(), 1, "cpu")
    segments = ops.Segments.of([0], [count], 1, "cpu")
    hidden = served.hidden(ids[:-1], torch.arange(count), Recurrence(pool.tensors, segments))
    return nn.functional.cross_entropy(served.logits(hidden), ids[1:], reduction="none").double()


if __name__ == "__main__":
    main()

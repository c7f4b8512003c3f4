"""The recurrent step alone: its bytes per second beside an in-place stream over the same bytes.

One measurement runs the step for every layer in turn, as decode does, on a pool of as many slots as
the batch has rows. The stream multiplies the same memory in place. `torch` is the better of two
formulations: baddbmm and bmm, or a sum of outer products and a product with the query.
"""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.common import Report, run, show
from benchmarks.shapes import SHAPES, seconds, stream_speed
from engine import ops
from engine.config import ModelConfig, StateSpec
from engine.ops import reference
from engine.state import available_memory

BATCHES = (1, 8, 64, 512)
MOST_MEMORY = 0.7
TOLERANCE = 1e-5


class Batch(NamedTuple):
    """q, k, v [B, H, D], a whole pool [B, L, H, D, D] and the slots int32 [B] in mixed order."""

    q: Tensor
    k: Tensor
    v: Tensor
    pool: Tensor
    slots: Tensor


def measure(quick: bool) -> Report:
    """A row for each shape and batch size that fits into memory."""
    check()
    shapes = {name: SHAPES[name] for name in (("default", "300M") if quick else SHAPES)}
    rows = [
        _row(name, config, batch, 0.3 if quick else 2.0)
        for name, config in shapes.items()
        for batch in BATCHES[: 3 if quick else 4]
        if _fits(config, batch)
    ]
    show("The recurrent step, all layers of a model in turn, float32", rows)
    return {"step": rows}


def check() -> None:
    """Refuse to measure a step that is wrong."""
    batch = _batch(SHAPES["300M"], 7)
    exact = batch.pool[:, 3].double()
    expected = reference.recurrent_step(
        batch.q.double(), batch.k.double(), batch.v.double(), exact, None, batch.slots
    )
    _step(batch, 3)
    out = _step(batch._replace(v=torch.zeros_like(batch.v)), 3)  # adds nothing, reads the same
    error = float((out - expected).abs().max() / expected.abs().max())
    if error > TOLERANCE:
        raise SystemExit(f"the step is off by {error:.1e} from the reference: nothing is reported")


def _batch(config: ModelConfig, size: int) -> Batch:
    generator = torch.Generator().manual_seed(size)
    shape = size, config.n_head, config.head_dim
    q, k, v = (torch.randn(shape, generator=generator) / config.head_dim**0.5 for _ in range(3))
    pool = torch.full((size, *StateSpec.of(config).state_shape), 0.01)
    return Batch(q, k, v, pool, torch.randperm(size, generator=generator).int())


def _step(batch: Batch, layer: int) -> Tensor:
    q, k, v, pool, slots = batch
    return ops.recurrent_step(q, k, v, pool[:, layer], None, slots)


def _fits(config: ModelConfig, batch: int) -> bool:
    needed = StateSpec.of(config).bytes_per_slot * batch
    return needed < MOST_MEMORY * available_memory("cpu")


def _row(name: str, config: ModelConfig, size: int, at_least: float) -> dict[str, object]:
    batch = _batch(config, size)
    layers = range(config.n_layer)
    took = seconds(lambda: [_step(batch, layer) for layer in layers], at_least=at_least)
    step = statistics.median(took)
    stream = stream_speed(batch.pool, at_least)
    peers = [statistics.median(seconds(f, at_least=at_least / 2)) for f in _peers(config, batch)]
    return {
        "shape": name,
        "batch": size,
        "state MiB": batch.pool.nbytes / 2**20,
        "us a layer": 1e6 * step / config.n_layer,
        "GB/s": 2e-9 * batch.pool.nbytes / step,
        "stream GB/s": 1e-9 * stream,
        "step / stream": 2 * batch.pool.nbytes / step / stream,
        "torch us a layer": 1e6 * min(peers) / config.n_layer,
        "torch / step": min(peers) / step,
    }


def _peers(config: ModelConfig, batch: Batch) -> list[Callable[[], object]]:
    """Torch's formulations on the same memory, laid out as each layer would have it contiguous."""
    width = config.head_dim
    states = batch.pool.view(config.n_layer, -1, width, width)
    q, k, v = (x.flatten(0, 1) for x in batch[:3])

    def products() -> None:
        for state in states:
            state.baddbmm_(v.unsqueeze(2), k.unsqueeze(1))
            torch.bmm(state, q.unsqueeze(2))

    def sums() -> None:
        for state in states:
            state.addcmul_(v.unsqueeze(2), k.unsqueeze(1))
            (state @ q.unsqueeze(2)).squeeze(2)

    return [products, sums]


if __name__ == "__main__":
    run(__doc__, measure)

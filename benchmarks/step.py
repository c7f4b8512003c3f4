"""The recurrent step alone: bytes per second, compared with a stream over the same memory.

A measurement runs the step for every layer in turn, as decode does, on a pool with as many slots as
the batch has rows. `one call` is the step of all layers' heads in one call, without what a call of
the op costs; the engine runs all layers of a model in one call, too. The stream scales the same
memory in place; on a GPU it copies one half onto the other, and the step runs as a captured graph.
`torch` is the better of two formulations, baddbmm and bmm, or a sum of outer products and a product
with the query, on contiguous states. `torch by slot` does the same work as the step: it gathers the
states from the pool and writes them back. All are called in turn, so that changes in memory
bandwidth affect all alike.

The step with a decay, and with a term that reads the state, is measured at the shapes of families
that have them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.common import Report, run_on_device, show
from benchmarks.devices import Cpu, Device, medians
from benchmarks.shapes import SHAPES
from cottention.engine import ops
from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.ops import reference
from cottention.engine.state.pool import available_memory

BATCHES = (1, 8, 64, 512)
MAX_MEMORY_FRACTION = 0.7
TOLERANCE = 1e-5


class Form(NamedTuple):
    """The recurrence of a published model: its layers, heads and widths, and its terms."""

    layers: int
    heads: int
    key: int
    value: int
    decay: str
    has_term: bool

    @property
    def bytes_per_row(self) -> int:
        return 4 * self.layers * self.heads * self.key * self.value


FORMS = {
    "RWKV-7 0.4B": Form(24, 16, 64, 64, "per key", has_term=True),
    "Mamba-2 370M": Form(48, 32, 128, 64, "per head", has_term=False),
    "Gated DeltaNet 0.4B": Form(21, 6, 256, 512, "per head", has_term=True),
}


class Batch(NamedTuple):
    """q, k, v [B, H, D], a pool [B, L, H, D, D], and state_indices int32 [B] in random order."""

    q: Tensor
    k: Tensor
    v: Tensor
    pool: Tensor
    state_indices: Tensor


def measure(quick: bool, device: Device | None = None) -> Report:
    """One row for each shape and batch size that fits into memory."""
    device = device or Cpu()
    check(device)
    with torch.inference_mode():  # as in the engine
        return _measured(quick, device)


def _measured(quick: bool, device: Device) -> Report:
    shapes = {name: SHAPES[name] for name in (("default", "300M") if quick else SHAPES)}
    rows = [
        _row(device, name, config, batch, 0.3 if quick else 2.0)
        for name, config in shapes.items()
        for batch in BATCHES[: 3 if quick else 4]
        if _fits(config, batch, device)
    ]
    show("The recurrent step, all layers of a model in turn", rows)
    forms = [
        _form_row(device, name, form, batch, 0.3 if quick else 2.0)
        for name, form in FORMS.items()
        for batch in BATCHES[: 2 if quick else 3]
        if form.bytes_per_row * batch < MAX_MEMORY_FRACTION * available_memory(device.name)
    ]
    show("The step of other recurrences", forms)
    return {"step": rows, "forms": forms}


def check(device: Device) -> None:
    """Exit if the step is wrong."""
    batch = _batch(SHAPES["300M"], 7, device)
    exact = batch.pool[:, 3].double()
    expected = reference.recurrent_step(
        batch.q.double(), batch.k.double(), batch.v.double(), exact, None, batch.state_indices
    )
    _step(batch, 3)
    out = _step(batch._replace(v=torch.zeros_like(batch.v)), 3)  # adds nothing, reads the same
    error = float((out - expected).abs().max() / expected.abs().max())
    if error > TOLERANCE:
        raise SystemExit(f"the step has a relative error of {error:.1e}: nothing is reported")


def _batch(config: GPTJConfig, size: int, device: Device) -> Batch:
    generator = torch.Generator().manual_seed(size)
    shape = size, config.n_head, config.head_dim
    q, k, v = (torch.randn(shape, generator=generator) / config.head_dim**0.5 for _ in range(3))
    pool = _pool((size, *config.state_spec().shapes["state"]), device)
    state_indices = torch.randperm(size, generator=generator).int()
    return Batch(*(x.to(device.name) for x in (q, k, v)), pool, state_indices.to(device.name))


def _pool(shape: Sequence[int], device: Device) -> Tensor:
    """Memory as in the engine's pool."""
    return ops.zeros(shape, device.name).fill_(0.01)


def _step(batch: Batch, layer: int) -> Tensor:
    q, k, v, pool, state_indices = batch
    return ops.recurrent_step(q, k, v, pool[:, layer], None, state_indices)


def _steps(batch: Batch) -> None:
    q, k, v, pool, state_indices = batch
    for layer in pool.unbind(1):
        ops.recurrent_step(q, k, v, layer, None, state_indices)


def _one_call(batch: Batch) -> Callable[[], object]:
    """The step of the heads of all layers, which all have the same q, k and v."""
    layers = batch.pool.shape[1]
    q, k, v = (x.repeat(1, layers, 1) for x in batch[:3])
    pool = batch.pool.flatten(1, 2)
    return lambda: ops.recurrent_step(q, k, v, pool, None, batch.state_indices)


def _fits(config: GPTJConfig, batch: int, device: Device) -> bool:
    needed = config.state_spec().bytes_per_slot * batch
    return needed < MAX_MEMORY_FRACTION * available_memory(device.name)


def _row(
    device: Device, name: str, config: GPTJConfig, size: int, at_least: float
) -> dict[str, object]:
    batch = _batch(config, size, device)
    moved, pool = 2 * batch.pool.nbytes, batch.pool
    stream = device.stream(pool)
    works = (
        device.repeatable(lambda: _steps(batch)),
        device.repeatable(_one_call(batch)),
        stream.work,
        device.repeatable(lambda: [layer.mul_(0.999) for layer in pool.unbind(1)]),
        device.repeatable(lambda: _by_slot(config, batch)),
        *map(device.repeatable, _peers(config, batch)),
    )
    step, at_once, streamed, by_layer, by_slot, *peers = medians(device, works, at_least=at_least)
    stream_speed = stream.num_bytes / streamed
    return {
        "shape": name,
        "batch": size,
        "dtype": str(pool.dtype).removeprefix("torch."),
        "state MiB": pool.nbytes / 2**20,
        "us/layer": 1e6 * step / config.n_layer,
        "GB/s": 1e-9 * moved / step,
        "stream GB/s": 1e-9 * stream_speed,
        "step / stream": moved / step / stream_speed,
        "one call / stream": moved / at_once / stream_speed,
        "step / by layer": by_layer / step,
        "torch / step": min(peers) / step,
        "torch by slot / step": by_slot / step,
    }


def _form_row(
    device: Device, name: str, form: Form, size: int, at_least: float
) -> dict[str, object]:
    generator = torch.Generator().manual_seed(size)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(size, form.heads, *shape, generator=generator).to(device.name)

    q, k, v = drawn(form.key), drawn(form.key), drawn(form.value) - 0.5
    w = 0.9 + drawn(*([form.key] if form.decay == "per key" else [])) / 10
    unit = torch.nn.functional.normalize(drawn(form.key) - 0.5, dim=-1)
    a, b = (-unit, unit / 2) if form.has_term else (None, None)
    pool = _pool((size, form.layers, form.heads, form.value, form.key), device)
    segments = ops.Segments(torch.randperm(size, generator=generator).int().to(device.name))

    def of_all(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.repeat(1, form.layers, *[1] * (x.dim() - 2))

    def step(pools: Sequence[Tensor], *terms: Tensor | None) -> None:
        q, k, v, w, a, b = terms
        for layer in pools:
            ops.recurrent_segments(q, k, v, layer, None, segments, w=w, a=a, b=b)

    terms = q, k, v, w, a, b
    stream = device.stream(pool)
    works = (
        device.repeatable(partial(step, pool.unbind(1), *terms)),
        device.repeatable(partial(step, [pool.flatten(1, 2)], *map(of_all, terms))),
        stream.work,
    )
    took, at_once, streamed = medians(device, works, at_least=at_least)
    stream_speed = stream.num_bytes / streamed
    return {
        "model": name,
        "batch": size,
        "decay": form.decay,
        "reads the state": "yes" if form.has_term else "no",
        "state MiB": pool.nbytes / 2**20,
        "us/layer": 1e6 * took / form.layers,
        "step / stream": 2 * pool.nbytes / took / stream_speed,
        "one call / stream": 2 * pool.nbytes / at_once / stream_speed,
    }


def _peers(config: GPTJConfig, batch: Batch) -> list[Callable[[], object]]:
    """Torch formulations on the same memory, with contiguous states for each layer."""
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


def _by_slot(config: GPTJConfig, batch: Batch) -> None:
    """The same through the pool, as a server without its own op would have to."""
    q, k, v = (x.flatten(0, 1) for x in batch[:3])
    state_indices = batch.state_indices.long()
    for layer in range(config.n_layer):
        pool = batch.pool[:, layer]
        states = pool[state_indices]
        rows = states.flatten(0, 1)
        rows.baddbmm_(v.unsqueeze(2), k.unsqueeze(1))
        torch.bmm(rows, q.unsqueeze(2))
        pool.index_copy_(0, state_indices, states)


if __name__ == "__main__":
    run_on_device(__doc__, measure)

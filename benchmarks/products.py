"""Products alone, by the type of the weights and the number of rows, all types by turns.

The large matrices of twelve layers of the 300M shape one after the other, more than caches hold.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.common import Report, run, show
from benchmarks.devices import DEVICES, medians
from benchmarks.shapes import weight_type
from cottention.engine import ops

CHANNELS_AND_COLUMNS = ((1024, 6144), (4096, 1024))
LAYERS = 12
KINDS = ("float32", "bfloat16", "bfloat16+compressed", "int8")
ROWS = (1, 2, 4, 6, 8, 10, 12, 16, 24, 36, 48, 64, 128, 512)
QUICK_ROWS = (1, 4, 8, 16, 64)


@torch.inference_mode()
def measure(quick: bool) -> Report:
    """A table of milliseconds: a row for each number of rows."""
    device = DEVICES["cpu"]
    at_least = 0.2 if quick else 1.0
    layers = {kind: _layers(kind) for kind in KINDS}
    table: list[dict[str, object]] = []
    for rows in QUICK_ROWS if quick else ROWS:
        inputs = {channels: torch.randn(rows, channels) for channels, _ in CHANNELS_AND_COLUMNS}
        works = [partial(_multiply, layers[kind], inputs) for kind in KINDS]
        took = dict(zip(KINDS, medians(device, works, at_least=at_least), strict=True))
        table.append(
            {
                "rows": rows,
                **{f"{kind}, ms": 1e3 * seconds for kind, seconds in took.items()},
                "bfloat16 / compressed": took["bfloat16"] / took["bfloat16+compressed"],
                "bfloat16 / int8": took["bfloat16"] / took["int8"],
                "read, GB/s": device.read_speed(at_least) / 1e9,
            }
        )
    size = {kind: sum(layer.weight.nbytes for layer in layers[kind]) / 2**20 for kind in KINDS}
    show("Weights, MiB", [size])
    show(f"Products of {LAYERS} layers of the 300M shape", table)
    return {"products": table, "products_mib": size}


def _layers(kind: str) -> list[ops.FixedOrderLinear]:
    dtype, storage = weight_type(kind)
    generator = torch.Generator().manual_seed(0)
    layers = []
    with ops.weight_storage(storage):
        for channels, columns in CHANNELS_AND_COLUMNS * LAYERS:
            weight = torch.randn(columns, channels, generator=generator) / channels**0.5
            layers.append(ops.FixedOrderLinear(weight.to(dtype)))
    return layers


def _multiply(layers: Sequence[ops.FixedOrderLinear], inputs: dict[int, Tensor]) -> None:
    for (channels, _), layer in zip(CHANNELS_AND_COLUMNS * LAYERS, layers, strict=True):
        layer(inputs[channels])


if __name__ == "__main__":
    run(__doc__ or "", measure)

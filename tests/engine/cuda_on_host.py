"""The CUDA ops without a GPU: their checks as they are, their threads in turn on the host.

`on_host` has the ops of csrc/cuda for CPU tensors, `as_on_cuda` lets a whole engine use them.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.ops import activations, fused, loader
from cottention.engine.ops.build import (
    build_dir,
    build_library,
    compiler,
    digest,
    flags,
    source_dir,
)
from tests.engine.step_cases import Case

OPS = (
    "recurrent_step",
    "recurrent_pieces",
    "cottention_attention_gelu",
    "cottention_pieces_gelu",
    "cottention_delayed_gelu",
    "map_gelu",
    "divide_outputs",
    "fold_updates",
    "add_layer_norm",
)


class Place(NamedTuple):
    """Where an op of CUDA runs in a test: the namespace of the ops, and its tensors' device."""

    ops: Any
    device: str


def on_host() -> Any:
    """The namespace of the ops: `torch.ops.cottention_on_host`."""
    _library()
    return torch.ops.cottention_on_host


def num_launches() -> int:
    """Kernels that the ops have enqueued so far in this process."""
    count: int = _library().num_launches()
    return count


def step_on_host(case: Case, *terms: Tensor | None) -> Tensor:
    """recurrent_step as on CUDA, on CPU tensors. terms: w, a and b."""
    out: Tensor = on_host().recurrent_step(*case, *terms)
    return out


def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on models on the CPU run as on a GPU: torch's products, the ops of `on_host`."""
    for name in OPS:
        monkeypatch.setattr(torch.ops.cottention, name, getattr(on_host(), name), raising=False)
    monkeypatch.setattr(ops, "can_pack", lambda _: False)
    monkeypatch.setattr(
        ops, "can_fuse_attention", lambda _, width: ops.fused_kernel_has_width(width)
    )
    for module in (ops, activations, fused):
        monkeypatch.setattr(module, "cuda_takes", lambda _: True)
    monkeypatch.setattr(ops, "segment_form", lambda *_: "pieces")
    monkeypatch.setattr(loader, "is_cuda_ready", lambda: True)


@functools.cache
def _library() -> ctypes.CDLL:
    """Compiled into the cache of the ops, where the other test processes find it."""
    kernels, ops_source = Path(__file__).with_suffix(".cpp"), source_dir() / "cuda" / "ops.cpp"
    root = Path(torch.__file__).parent
    options = f"{flags()} -O2 -Wall -Werror -Wno-unknown-pragmas -DCOTTENTION_ON_HOST"
    command = f"{compiler()} {options} -isystem {root / 'include'}"
    objects = {"kernels.o": kernels, "ops.o": ops_source}
    link = f"{compiler()} {flags()} -shared $in -o $out -L{root / 'lib'} -ltorch_cpu -lc10"
    rules = [
        f"rule compile\n  command = {command} -c $in -o $out",
        f"rule link\n  command = {link}",
    ]
    edges = [f"build {name}: compile {source}" for name, source in objects.items()]
    text = "\n".join([*rules, *edges, f"build library.so: link {' '.join(objects)}", ""])
    sources = [
        kernels,
        *source_dir().glob("*.h"),
        *(source_dir() / "cuda").glob("*.*h"),
        ops_source,
    ]
    library = build_dir() / f"cuda-on-host-{digest(text, sources)}.so"
    build_library(library, lambda: text)
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))

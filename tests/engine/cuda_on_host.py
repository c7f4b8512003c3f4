"""The CUDA step without a GPU: its per-thread functions, compiled for the host."""

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.ops.build import BuildError, compiler
from tests.engine.step_cases import Case

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class View(ctypes.Structure):
    """As in csrc/cuda/params.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("token_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
    )


class StepParams(ctypes.Structure):
    """As in csrc/cuda/params.h."""

    _fields_ = (
        ("q", View),
        ("k", View),
        ("v", View),
        ("state", ctypes.c_void_p),
        ("z", ctypes.c_void_p),
        ("state_stride", ctypes.c_int64),
        ("z_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("segments", ctypes.c_int64),
        ("heads", ctypes.c_int),
        ("key_width", ctypes.c_int),
        ("value_width", ctypes.c_int),
        ("num_slots", ctypes.c_int),
        ("is_aligned", ctypes.c_bool),
    )


def step_on_host(case: Case) -> Tensor:
    """What the op does on CUDA, on tensors of the CPU; outputs begin as NaN."""
    tokens, heads, value = case.v.shape
    out = torch.full((tokens, heads, value), float("nan"), dtype=case.v.dtype)
    params = StepParams(
        *(View(x.data_ptr(), *x.stride()[:2]) for x in case[:3]),
        state=case.state.data_ptr(),
        z=None if case.z is None else case.z.data_ptr(),
        state_stride=case.state.stride(0),
        z_stride=0 if case.z is None else case.z.stride(0),
        out=out.data_ptr(),
        out_stride=heads * value,
        slots=case.slots.data_ptr(),
        offsets=None if case.offsets is None else case.offsets.data_ptr(),
        tokens=tokens,
        segments=len(case.slots),
        heads=heads,
        key_width=case.q.shape[2],
        value_width=value,
        num_slots=len(case.state),
        is_aligned=_is_aligned(case.q) and _is_aligned(case.k),
    )
    _library()(ctypes.byref(params), TYPES[case.q.dtype])
    return out


def _is_aligned(x: Tensor) -> bool:
    strides = (x.stride(0) % 4, x.stride(1) % 4)
    return x.data_ptr() % (4 * x.element_size()) == 0 and strides == (0, 0)


@functools.cache
def _library() -> Callable[..., None]:
    """Compiled once per process."""
    source = Path(__file__).with_suffix(".cpp")
    include = Path(torch.__file__).parent / "include"
    flags = "-std=c++17 -O2 -fPIC -shared -Wall -Werror -Wno-unknown-pragmas"
    with tempfile.TemporaryDirectory() as folder:
        target = os.path.join(folder, "cuda_on_host.so")
        command = [*shlex.split(compiler()), *flags.split(), "-isystem", str(include)]
        run = subprocess.run(
            [*command, str(source), "-o", target], capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise BuildError(run.stderr)
        function: Callable[..., None] = ctypes.CDLL(target).step_on_host
    return function

"""The CUDA ops without a GPU: their per-thread functions, compiled for the host."""

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from cottention.engine.ops.build import (
    build_dir,
    build_library,
    compiler,
    digest,
    source_dir,
)
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
        ("w", View),
        ("a", View),
        ("b", View),
        ("state", ctypes.c_void_p),
        ("z", ctypes.c_void_p),
        ("state_stride", ctypes.c_int64),
        ("z_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("state_indices", ctypes.c_void_p),
        ("cu_seqlens", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("segments", ctypes.c_int64),
        ("heads", ctypes.c_int),
        ("key_width", ctypes.c_int),
        ("value_width", ctypes.c_int),
        ("num_slots", ctypes.c_int),
        ("decay", ctypes.c_int),
        ("has_term", ctypes.c_bool),
        ("is_aligned", ctypes.c_bool),
        ("is_terms_aligned", ctypes.c_bool),
    )


class FeaturesGeluParams(ctypes.Structure):
    """As in csrc/cuda/params.h."""

    _fields_ = (
        ("q", View),
        ("k", View),
        ("v", View),
        ("positions", ctypes.c_void_p),
        ("sigma", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("q_out", ctypes.c_void_p),
        ("k_out", ctypes.c_void_p),
        ("v_out", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("gelu", ctypes.c_void_p),
        ("up_stride", ctypes.c_int64),
        ("gelu_stride", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int),
        ("width", ctypes.c_int),
        ("pairs", ctypes.c_int),
        ("inner", ctypes.c_int),
        ("is_aligned", ctypes.c_bool),
    )


def step_on_host(case: Case, *terms: Tensor | None) -> Tensor:
    """recurrent_step as on CUDA, on CPU tensors; outputs start as NaN. terms: w, a and b."""
    out = torch.full(case.v.shape, float("nan"), dtype=case.v.dtype)
    _step(case, out, out.stride(0), *terms)
    return out


def attention_gelu_on_host(
    joined: Tensor,
    positions: Tensor,
    sigma: Tensor,
    cos: Tensor,
    sin: Tensor,
    state: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor | None,
    out: Tensor,
) -> None:
    """cottention_attention_gelu as on CUDA, on CPU tensors."""
    tokens, (_, heads, width, _) = len(joined), state.shape
    channels = heads * width
    mapped = torch.full((3, tokens, heads, width), float("nan"))
    q, k, v = joined[:, : 3 * channels].view(tokens, 3, heads, width).unbind(1)
    up, gelu = joined[:, 3 * channels :], out[:, channels:]
    params = FeaturesGeluParams(
        *(View(x.data_ptr(), joined.stride(0), width) for x in (q, k, v)),
        *(x.data_ptr() for x in (positions, sigma, cos, sin, *mapped, up, gelu)),
        up_stride=joined.stride(0),
        gelu_stride=out.stride(0),
        tokens=tokens,
        heads=heads,
        width=width,
        pairs=cos.shape[1],
        inner=up.shape[1],
        is_aligned=_is_aligned(up) and _is_aligned(gelu),
    )
    _library().features_gelu_on_host(ctypes.byref(params), TYPES[joined.dtype])
    _step(Case(*mapped, state, None, state_indices, cu_seqlens), out, out.stride(0))


def _step(
    case: Case,
    out: Tensor,
    out_stride: int,
    w: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> None:
    """Write to out, whose tokens are `out_stride` elements apart."""
    tokens, heads, value = case.v.shape
    given = (*case[:3], w, a, b)
    params = StepParams(
        *(View() if x is None else View(x.data_ptr(), *x.stride()[:2]) for x in given),
        state=case.state.data_ptr(),
        z=None if case.z is None else case.z.data_ptr(),
        state_stride=case.state.stride(0),
        z_stride=0 if case.z is None else case.z.stride(0),
        out=out.data_ptr(),
        out_stride=out_stride,
        state_indices=case.state_indices.data_ptr(),
        cu_seqlens=None if case.cu_seqlens is None else case.cu_seqlens.data_ptr(),
        tokens=tokens,
        segments=len(case.state_indices),
        heads=heads,
        key_width=case.q.shape[2],
        value_width=value,
        num_slots=len(case.state),
        decay=0 if w is None else w.dim() - 1,
        has_term=a is not None,
        is_aligned=_is_aligned(case.q) and _is_aligned(case.k),
        is_terms_aligned=all(_is_aligned(x) for x in (w, a, b) if x is not None),
    )
    _library().step_on_host(ctypes.byref(params), TYPES[case.q.dtype], TYPES[out.dtype])


def _is_aligned(x: Tensor) -> bool:
    """Whether four elements can be accessed at once at every index that is a multiple of four."""
    strides = [stride % 4 for stride in x.stride()[:-1]]
    return x.data_ptr() % (4 * x.element_size()) == 0 and not any(strides)


@functools.cache
def _library() -> ctypes.CDLL:
    """Compiled into the cache of the ops, where the other test processes find it."""
    source = Path(__file__).with_suffix(".cpp")
    include = Path(torch.__file__).parent / "include"
    extra = os.environ.get("COTTENTION_CXXFLAGS", "")
    flags = f"-std=c++17 -O2 -fPIC -shared -Wall -Werror -Wno-unknown-pragmas {extra}"
    command = f"{compiler()} {flags} -isystem {include} {source} -o library.so"
    sources = [source, *source_dir().glob("*.h"), *(source_dir() / "cuda").glob("*.*h")]
    library = build_dir() / f"cuda-on-host-{digest(command, sources)}.so"
    rules = f"rule all\n  command = {command}\nbuild library.so: all\n"
    return ctypes.CDLL(str(build_library(library, lambda: rules)))

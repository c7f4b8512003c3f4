"""Loads the compiled ops once per process, building them first if needed.

Without a compiler the torch reference runs instead, which is logged once. COTTENTION_OPS=compiled
makes that an error, COTTENTION_OPS=reference skips the attempt.
"""

import functools
import logging
import os
import threading
from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from cottention.engine.ops.build import (
    CHOICE_VARIABLE,
    BuildError,
    build,
    build_cuda,
    find,
    find_cuda,
    is_cuda_wanted,
)
from cottention.engine.ops.checks import HALF_OR_SINGLE
from cottention.engine.ops.fakes import FAKES

Backend = Literal["compiled", "reference"]

_logger = logging.getLogger(__name__)
_lock = threading.Lock()


@functools.cache
def backend() -> Backend:
    """The implementation that this process uses; the first call finds, builds and loads the ops.

    Raises BuildError if COTTENTION_OPS=compiled and that fails, ValueError for an unknown value.
    """
    with _lock:  # for first calls at the same time, of which one chooses
        return _choose()


def must_compile() -> bool:
    """Whether COTTENTION_OPS=compiled makes missing compiled ops an error."""
    return os.environ.get(CHOICE_VARIABLE) == "compiled"


@functools.cache
def _choose() -> Backend:
    choice = os.environ.get(CHOICE_VARIABLE) or "any"
    if choice not in ("any", "compiled", "reference"):
        raise ValueError(f"{CHOICE_VARIABLE}={choice}: must be compiled or reference")
    if choice == "reference":
        return "reference"
    try:
        _load()
    except (OSError, BuildError) as error:
        if must_compile():
            raise BuildError(f"{CHOICE_VARIABLE}=compiled: {error}") from error
        _logger.warning("compiled ops not available, the torch reference runs: %s", error)
        return "reference"
    return "compiled"


def _load() -> None:
    torch.ops.load_library(find() or build())
    for name, fake in FAKES.items():
        torch.library.register_fake(f"cottention::{name}", fake)


def compiled_takes(
    x: Tensor, *others: Tensor | None, types: Collection[torch.dtype] = (torch.float32,)
) -> bool:
    """Whether the CPU op takes x. The op itself refuses arguments that do not match x."""
    if not x.is_cpu or x.dtype not in types:
        return False
    return not needs_gradient(x, *others) and backend() == "compiled"


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether an operation on these tensors is recorded for a backward pass."""
    if not torch.is_grad_enabled():
        return False
    return any(x is not None and x.requires_grad for x in tensors)


def cuda_takes(x: Tensor) -> bool:
    """Whether the CUDA op takes x. The op itself refuses arguments that do not match x."""
    return x.is_cuda and x.dtype in HALF_OR_SINGLE and is_cuda_ready()


@functools.cache
def warn_reference(reason: str) -> None:
    """Log a warning, once per reason, that the torch reference runs in place of a compiled op."""
    _logger.warning("the torch reference runs: %s", reason)


DELAYED_VARIABLE = "COTTENTION_DELAYED_UPDATES"


def num_delayed_updates() -> int:
    """How many updates of a state a CUDA step may delay: COTTENTION_DELAYED_UPDATES, 0 by default.

    Raises ValueError for what is not a whole number from 0 to 64.
    """
    given = os.environ.get(DELAYED_VARIABLE) or "0"
    if not given.isdecimal() or int(given) > 64:
        raise ValueError(f"{DELAYED_VARIABLE}={given}: must be a whole number from 0 to 64")
    return int(given)


_cuda_lock = threading.Lock()


def is_cuda_ready() -> bool:
    """Whether the CUDA ops are registered; the first call finds, builds and loads them.

    Raises BuildError if COTTENTION_OPS=compiled and that fails.
    """
    with _cuda_lock:
        return _load_cuda()


@functools.cache
def _load_cuda() -> bool:
    if not is_cuda_wanted() or backend() == "reference":
        return False
    try:
        torch.ops.load_library(find_cuda() or build_cuda())
    except (OSError, BuildError) as error:
        if must_compile():
            raise BuildError(f"the CUDA ops: {error}") from error
        warn_reference(f"no CUDA ops: {error}")
        return False
    return True

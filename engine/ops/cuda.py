"""Loads the CUDA ops once per process, or says once why torch's own operations run instead.

Owns that choice. Knows no arithmetic. Whoever passes a tensor on a GPU asks `is_ready`.
"""

import functools
import threading

import torch
from cottention.engine.ops.build import BuildError
from cottention.engine.ops.build_cuda import build_cuda, find_cuda, is_wanted
from cottention.engine.ops.loader import announce_reference, backend, must_compile

_lock = threading.Lock()


def is_ready() -> bool:
    """Whether the CUDA ops are registered; the first call finds, builds and loads them.

    COTTENTION_OPS=compiled makes a failure an error (BuildError), =reference skips the attempt.
    """
    with _lock:
        return _load()


@functools.cache
def _load() -> bool:
    if not is_wanted() or backend() == "reference":
        return False
    try:
        torch.ops.load_library(find_cuda() or build_cuda())
    except (OSError, BuildError) as error:
        if must_compile():
            raise BuildError(f"the CUDA ops: {error}") from error
        announce_reference(f"no CUDA ops: {error}")
        return False
    return True

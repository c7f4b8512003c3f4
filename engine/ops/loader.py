"""Loads the compiled ops once per process, or says once why the torch reference runs instead.

Owns the choice between the two. Knows no arithmetic.
"""

import functools
import logging
import os
import threading
from typing import Literal

import torch
from cottention.engine.ops.build import BuildError, build, find
from cottention.engine.ops.fakes import FAKES

Backend = Literal["compiled", "reference"]
CHOICE_VARIABLE = "COTTENTION_OPS"

_logger = logging.getLogger(__name__)
_lock = threading.Lock()


def backend() -> Backend:
    """Which form of the ops this process runs; the first call finds, builds and loads them.

    COTTENTION_OPS=compiled makes a failure an error (BuildError), =reference skips the attempt.
    """
    with _lock:
        return _choose()


def must_compile() -> bool:
    """Whether COTTENTION_OPS=compiled makes the absence of compiled ops an error."""
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


@functools.cache
def announce_reference(reason: str) -> None:
    """Say once per reason that the torch reference runs where the compiled ops were expected."""
    _logger.warning("the torch reference runs: %s", reason)

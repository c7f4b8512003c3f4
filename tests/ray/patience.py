"""Waiting for what settles. tests/server/live.py has the same for tests with a server inside."""

import time
from collections.abc import Callable

PATIENCE = 200.0
"""Seconds after which something hangs, on a machine that does other things as well."""


def eventually(condition: Callable[[], bool]) -> None:
    """Return when it holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE:.0f} s"
        time.sleep(0.2)

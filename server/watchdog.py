"""Somebody else's Python that must end: an exception is raised in its thread when its time is over.

Owns the timer and that it cannot strike after the end. Does not help against a single call of C
that takes long.
"""

import contextlib
import ctypes
import threading
import time
from collections.abc import Iterator


class OvertimeError(BaseException):
    """The time is over; no `except Exception` of the code in question swallows it."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises OvertimeError in the block, wherever it is by then."""
    thread = ctypes.c_ulong(threading.get_ident())
    lock, is_over = threading.Lock(), False

    def strike() -> None:
        with lock:
            if not is_over:
                error = ctypes.py_object(OvertimeError)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, error)

    timer = threading.Timer(seconds, strike)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            is_over = True
        time.sleep(0)  # what was struck with is raised here at the latest

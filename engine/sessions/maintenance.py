"""What sessions need done now and then, by a thread of its own.

Owns when. What is done is `Sessions.tend`'s; nothing of it waits for a turn, nor a turn for it.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 0.2
"""Between portions of what is past its time, where there is more: turns use the disk meanwhile."""


@contextmanager
def upkeep(tend: Callable[[], bool], seconds: float) -> Iterator[None]:
    """Within the block `tend` is called every so many seconds, and sooner where it leaves work."""
    stopping = threading.Event()
    thread = threading.Thread(target=_run, args=(tend, seconds, stopping), name="upkeep")
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def _run(tend: Callable[[], bool], seconds: float, stopping: threading.Event) -> None:
    wait = seconds
    while not stopping.wait(wait):
        try:
            wait = min(PAUSE_SECONDS, seconds) if tend() else seconds
        except Exception:
            logger.exception("sessions could not be tended; it is tried again")
            wait = seconds

"""A thread that calls `SessionManager.maintain` periodically."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cottention.engine.errors import StoreUnavailableError

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 0.2
"""Between calls where there is more to do: turns can use the disk meanwhile."""


@contextmanager
def maintenance_thread(maintain: Callable[[], bool], seconds: float) -> Iterator[None]:
    """Within the block `maintain` is called every `seconds`, and sooner while it returns True."""
    stopping = threading.Event()
    thread = threading.Thread(
        target=_run, args=(maintain, seconds, stopping), name="session-maintenance"
    )
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def _run(maintain: Callable[[], bool], seconds: float, stopping: threading.Event) -> None:
    wait = seconds
    while not stopping.wait(wait):
        try:
            wait = min(PAUSE_SECONDS, seconds) if maintain() else seconds
        except StoreUnavailableError as error:  # the store has logged it
            logger.debug("the maintenance of sessions is tried again: %s", error)
            wait = seconds
        except Exception:
            logger.exception("the maintenance of sessions failed; it is tried again")
            wait = seconds

"""What the system refuses a store, as StoreUnavailableError, and the lines of the log about it.

Which operation failed decides, never the error's number: a store that cannot write, for whatever
reason, leaves what was stored before as it is.
"""

import errno
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cottention.engine.errors import StoreFullError, StoreUnavailableError

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 60.0
"""Between two lines of the log about the same fault."""

REFUSALS = (OSError, sqlite3.OperationalError)
"""What files and the index raise where the system refuses an operation. Damage is another error:
sqlite3.DatabaseError itself, or SnapshotError."""


class StoreFaults:
    """The faults of one store. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._logged_at: dict[str, float] = {}
        self._num_unlogged: dict[str, int] = {}

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Raise StoreUnavailableError for what is refused within the block, which writes."""
        try:
            yield
        except REFUSALS as error:
            raise self._unavailable("does not take writes", error) from error

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Raise StoreUnavailableError for what is refused within the block, which reads."""
        try:
            yield
        except REFUSALS as error:
            raise self._unavailable("cannot be read", error) from error

    def _unavailable(self, what: str, error: Exception) -> StoreUnavailableError:
        reason = reason_of(error)
        made = (
            StoreFullError(f"the session folder's disk is full: {reason}")
            if is_disk_full(error)
            else StoreUnavailableError(f"the session folder {what}: {reason}")
        )
        self._log(str(made))
        return made

    def _log(self, message: str) -> None:
        """One line for each message and minute, with the number of those that were left out."""
        now = self._clock()
        with self._lock:
            logged_at = self._logged_at.get(message)
            if logged_at is not None and now - logged_at < SECONDS_BETWEEN_LINES:
                self._num_unlogged[message] = self._num_unlogged.get(message, 0) + 1
                return
            self._logged_at[message] = now
            num_unlogged = self._num_unlogged.pop(message, 0)
        logger.warning("%s%s", message, f" ({num_unlogged} times more before)" * bool(num_unlogged))


def reason_of(error: Exception) -> str:
    """The system's words, without the name of a file that is only staged."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def is_disk_full(error: Exception) -> bool:
    """Whether an error says that there is no room. It chooses words and codes, nothing else."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL

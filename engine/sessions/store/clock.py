"""The time of a store, in which lifetimes count: seconds that pass evenly in spite of the system's
clock, which may be set forward or back by hours while a process runs or while none does.

docs/sessions.md, "Time", explains the rules.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

logger = logging.getLogger(__name__)

STEP_SECONDS = 1.0
"""A difference between the two clocks that changes by more is a step of the system's clock."""

SECONDS_TO_TRUST_DOWNTIME = 6 * 3600.0
"""How long after a start the time since the last stop, which only the system's clock can say, may
still turn out to be a wrong one; until then nothing is deleted because of it."""

MAX_READING_SECONDS = 0.1
"""Both clocks are read within this, if the process is not stopped in between again and again."""


class ClockReading(NamedTuple):
    """A moment by the store's time, and the least that the system's clock says after it.

    In unix seconds. They are the same at first. They differ by what the system's clock was set
    forward while a process ran; where it was set back, that may be undone.
    """

    time: float
    wall: float


def seconds_since_boot() -> float:
    """A clock that nobody can set, and that counts while the machine is suspended, if there is one.

    The origin is arbitrary.
    """
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class StoreClock:
    """The store's time while one process has it open. Thread-safe.

    The time is that of the last reading, plus the downtime (since then, until the start), plus what
    `monotonic` has counted since. Only the downtime depends on the system's clock: it is never
    negative, and it shrinks where that clock is set back soon after the start.
    """

    def __init__(
        self,
        last: ClockReading | None,
        wall: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        """last: what `reading` returned to an earlier process. wall: unix seconds."""
        self._wall = wall
        self.monotonic = monotonic
        self._lock = threading.Lock()
        self._started = monotonic()
        now = wall()
        self._last = last or ClockReading(now, now)
        self._downtime = max(0.0, now - self._last.wall)
        self._offset = round(now - self._last.time - self._downtime)
        if (behind := self._last.wall - now) > STEP_SECONDS:
            logger.warning(
                "the system's clock is %.0f seconds behind the last time that the session folder"
                " was used: no session expires early, and the time since then does not count",
                behind,
            )

    def now(self) -> float:
        """The store's time, in seconds."""
        return self._read()[0]

    def earliest(self) -> float:
        """The store's time without a downtime that may still turn out to be a wrong one."""
        now, _, downtime = self._read()
        return now - downtime

    def unix_time(self, moment: float) -> float:
        """A moment of the store's time by the system's clock as it is now."""
        self._read()
        return moment + self._offset

    def reading(self) -> ClockReading:
        """What the next process's clock begins with. It counts a doubtful downtime again."""
        now, wall, downtime = self._read()
        time = now - downtime
        never_set_back = self._last.wall + (time - self._last.time)
        return ClockReading(time, max(never_set_back, wall - downtime))

    def _read(self) -> tuple[float, float, float]:
        """The store's time, the system's clock, and the downtime if it is doubtful, else 0."""
        wall, monotonic = self._read_both()
        with self._lock:
            elapsed = monotonic - self._started
            is_doubtful = elapsed < SECONDS_TO_TRUST_DOWNTIME
            downtime = max(0.0, wall - elapsed - self._last.wall)
            if is_doubtful and downtime < self._downtime - STEP_SECONDS:
                self._downtime = downtime
            now = self._last.time + self._downtime + elapsed
            if abs(wall - now - self._offset) > STEP_SECONDS:
                before, self._offset = self._offset, round(wall - now)
                logger.info(
                    "the system's clock differs from the session folder's time by %d seconds now,"
                    " by %d before: lifetimes of sessions do not depend on it",
                    self._offset,
                    before,
                )
            return now, wall, self._downtime if is_doubtful else 0.0

    def _read_both(self) -> tuple[float, float]:
        """Both clocks at one moment: a thread that is stopped in between sees no step."""
        for _ in range(10):
            before = self.monotonic()
            wall = self._wall()
            if self.monotonic() - before < MAX_READING_SECONDS:
                break
        return wall, before

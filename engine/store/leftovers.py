"""Folders of sessions that were to end with their process, and did not: it was killed.

Owns what proves such a folder's owner dead. Does not know what is in it.
"""

import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cottention.engine.store.disk import LOCK, TEMPORARY

TAKEN = re.compile(rf"pid \d+{TEMPORARY}\n".encode())


def remove_leftovers(place: Path, prefix: str) -> list[Path]:
    """Remove this user's folders of dead processes in `place`, of names that begin so; which.

    A folder without a lock, or with one that nobody has taken yet, may be about to be used; one
    whose lock was last taken for keeps is somebody's own, whatever its name. All of them stay.
    """
    removed = []
    for folder in place.glob(f"{prefix}*"):
        with suppress(OSError), _left(folder):
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed


@contextmanager
def _left(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that is left over. OSError: it is not, or cannot be held."""
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise PermissionError(folder)
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        _require_taken(fd)  # before it is held, too: nobody is kept from a lock that is new
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _require_taken(fd)
        yield
    finally:
        os.close(fd)


def _require_taken(fd: int) -> None:
    if not TAKEN.fullmatch(os.pread(fd, 64, 0)):
        raise BlockingIOError("it is about to be used, or is kept")

"""A disk that is full, and the folder that belongs to one process.

Owns which failures mean that the disk takes no more, the reserve, and the lock. Does not know what
is written.
"""

import errno
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import ConfigurationError, StoreFullError

FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
FULL_CODES = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}

RESERVE_BYTES = 2 << 20
"""More than the index's log ever grows to between two checkpoints of it."""


def means_full(error: Exception) -> bool:
    """Whether the disk refused to take it."""
    if isinstance(error, sqlite3.OperationalError):
        return error.sqlite_errorcode & 0xFF in FULL_CODES
    return isinstance(error, OSError) and error.errno in FULL_ERRNOS


@contextmanager
def told_as_full() -> Iterator[None]:
    """StoreFullError in place of what the system says."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        if not means_full(error):
            raise
        raise StoreFullError(f"the session folder's disk takes no more: {error}") from error


def sync_folder(folder: Path) -> None:
    """Make the folder's names durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Reserve:
    """Space kept back, so that leases and deletions can still be noted when the disk is full.

    A deletion on a full disk needs a little room before it makes more.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_kept = False

    def fill(self) -> bool:
        """Keep it back, where there is room; whether it is."""
        if not self._is_kept:
            self._is_kept = self._allocate()
        return self._is_kept

    def spend(self) -> bool:
        """Give it to whoever needs it now; whether there was any."""
        was_kept, self._is_kept = self._is_kept, False
        self._path.unlink(missing_ok=True)
        return was_kept

    def _allocate(self) -> bool:
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
        except OSError:
            return False
        try:
            os.posix_fallocate(fd, 0, RESERVE_BYTES)
        except OSError:
            self._path.unlink(missing_ok=True)
            return False
        finally:
            os.close(fd)
        return True


class FolderLock:
    """A folder belongs to one live process: the system drops the lock when that process dies."""

    def __init__(self, path: Path) -> None:
        """ConfigurationError: another process has it."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            os.close(fd)
            raise ConfigurationError(
                f"{path.parent} is in use by another process ({owner or 'unknown'}): "
                "a folder of sessions belongs to one server"
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"pid {os.getpid()}\n".encode(), 0)
        self._fd: int | None = fd

    def release(self) -> None:
        """Let another process have the folder; nothing happens the second time."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def take_folder(folder: Path) -> FolderLock:
    """A folder of this process alone; made for the user's eyes only where it is not there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return FolderLock(folder / "lock")
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot hold sessions: {error}") from error

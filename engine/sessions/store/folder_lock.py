"""A disk that is full, and the folder that belongs to one process.

Owns which failures mean that the disk takes no more, and the lock. Does not know what
is written.

Folders of sessions that were to end with their process, and did not: it was killed.

Owns what proves such a folder's owner dead. Does not know what is in it.
"""

import errno
import fcntl
import os
import re
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cottention.engine.errors import ConfigurationError, StoreFullError

LOCK = "lock"
TEMPORARY = ", temporary"
"""In the lock of a folder that ends with its process, so that others may remove it after a kill."""

FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
FULL_CODES = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}


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


class FolderLock:
    """A folder belongs to one live process: the system drops the lock when that process dies."""

    def __init__(self, path: Path, mark: str = "") -> None:
        """mark: what is noted there beside the process. ConfigurationError: another has it."""
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
        os.pwrite(fd, f"pid {os.getpid()}{mark}\n".encode(), 0)
        self._fd: int | None = fd

    def release(self) -> None:
        """Let another process have the folder; nothing happens the second time."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def take_folder(folder: Path, mark: str = "") -> FolderLock:
    """A folder of this process alone; made for the user's eyes only where it is not there."""
    with told_as_unusable(folder):
        _make(folder)
        return FolderLock(folder / LOCK, mark)


def check_folder(folder: Path) -> None:
    """The ConfigurationError of a folder that could not be taken now; what is new goes again.

    A new folder gets no lock: whoever took it meanwhile would be left with one that is removed.
    """
    with told_as_unusable(folder):
        new = [each for each in (folder, *folder.parents) if not each.exists()]
        try:
            _make(folder)
            if not new:
                FolderLock(folder / LOCK).release()
        finally:
            for each in new:
                with suppress(OSError):  # it was not made, or somebody has begun to use it
                    each.rmdir()


def _make(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


@contextmanager
def told_as_unusable(folder: Path) -> Iterator[None]:
    """ConfigurationError in place of what the system says."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        raise ConfigurationError(
            f"{folder} cannot hold sessions: {_reason(error, folder)}; give --session-dir a folder"
            " that this process may write to, or the name of a new one"
        ) from error


def _reason(error: Exception, folder: Path) -> str:
    """For a person: what is in the way, and where, if it is not the folder itself."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    where = "" if error.filename in (None, str(folder)) else f" ({error.filename})"
    return f"{_REASONS.get(type(error), error.strerror.lower())}{where}"


_REASONS: dict[type[Exception], str] = {
    FileExistsError: "it is a file",
    NotADirectoryError: "a part of its path is a file",
    PermissionError: "writing there is not permitted",
}


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

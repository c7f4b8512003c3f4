"""The folder of a store: its lock, why it cannot be used, and folders that a kill left behind."""

import fcntl
import os
import re
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cottention.engine.errors import ConfigurationError

LOCK = "lock"
TEMPORARY = ", temporary"
"""Marks the lock of a folder that ends with its process: others may remove it after a kill."""


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class FolderLock:
    """The lock of a folder's one process; the system releases it when that process dies."""

    def __init__(self, path: Path, mark: str = "") -> None:
        """mark: written into the file after the process id.

        ConfigurationError: another process has the lock.
        """
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            os.close(fd)
            raise ConfigurationError(
                f"{path.parent} is in use by another process ({owner or 'unknown'}): "
                "a folder of sessions belongs to one server; give --session-dir another folder, or"
                " end that process"
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"pid {os.getpid()}{mark}\n".encode(), 0)
        self._fd: int | None = fd

    def release(self) -> None:
        """Release the lock; nothing happens the second time."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def lock_folder(folder: Path, mark: str = "") -> FolderLock:
    """Lock a folder for this process, and create it where there is none, for its user alone.

    ConfigurationError: it cannot be used, or another process has it.
    """
    with raise_unusable_folder(folder):
        _make(folder)
        return FolderLock(folder / LOCK, mark)


def check_folder(folder: Path) -> None:
    """Raise the ConfigurationError of `lock_folder`; folders created for the check are removed.

    A new folder is not locked: a process that took it meanwhile would lose its lock file.
    """
    with raise_unusable_folder(folder):
        new = [each for each in (folder, *folder.parents) if not each.exists()]
        try:
            _make(folder)
            if not new:
                FolderLock(folder / LOCK).release()
        finally:
            for each in new:
                with suppress(OSError):  # it was not created, or another process uses it
                    each.rmdir()


def _make(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


@contextmanager
def raise_unusable_folder(folder: Path) -> Iterator[None]:
    """Raise ConfigurationError in place of the system's errors."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        raise ConfigurationError(
            f"{folder} cannot hold sessions: {_reason(error, folder)}; give --session-dir a folder"
            " that this process may write to, or the name of a new one"
        ) from error


def _reason(error: Exception, folder: Path) -> str:
    """What is wrong, and where, if it is not the folder itself."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    where = "" if error.filename in (None, str(folder)) else f" ({error.filename})"
    return f"{_REASONS.get(type(error), error.strerror.lower())}{where}"


_REASONS: dict[type[Exception], str] = {
    FileExistsError: "it is a file",
    NotADirectoryError: "a part of its path is a file",
    PermissionError: "writing there is not permitted",
}


TEMPORARY_LOCK = re.compile(rf"pid \d+{TEMPORARY}\n".encode())


def remove_leftovers(place: Path, prefix: str) -> list[Path]:
    """Remove this user's folders in `place`, with this prefix, whose processes are dead.

    Returns those that were removed. A folder without a lock, or with an empty lock file, may be
    about to be used, and one whose lock has no mark of a temporary folder is kept on purpose: they
    stay.
    """
    removed = []
    for folder in place.glob(f"{prefix}*"):
        with suppress(OSError), _leftover(folder):
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed


@contextmanager
def _leftover(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that was left behind. OSError: it was not, or is locked."""
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise PermissionError(folder)
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        _require_temporary(fd)  # checked before locking as well: a new lock is not disturbed
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _require_temporary(fd)
        yield
    finally:
        os.close(fd)


def _require_temporary(fd: int) -> None:
    if not TEMPORARY_LOCK.fullmatch(os.pread(fd, 64, 0)):
        raise BlockingIOError("it is about to be used, or is kept on purpose")

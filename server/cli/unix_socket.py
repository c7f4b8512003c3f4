"""The unix socket of --uds: its file, who may connect, and what a server before it left behind.

A socket's file outlives its process. It is replaced only where nobody listens; the folder is locked
meanwhile, so that of two servers that start at once only one takes a path.
"""

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from cottention.engine.errors import ConfigurationError

UMASK = 0o117
"""Owner and group can connect: a proxy joins the group."""


@contextlib.contextmanager
def unix_socket(path: str, backlog: int) -> Iterator[socket.socket]:
    """A listening socket whose file is removed at the end. Raises ConfigurationError.

    backlog: number of connections that may wait to be accepted.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with sock:
        try:
            with _locked(Path(path).parent):
                _remove_stale(path)
                _bind(sock, path)
                sock.listen(backlog)
                file = os.open(path, os.O_PATH)  # while it is open, no other has its inode's number
        except OSError as error:
            raise _unusable(path, error.strerror or str(error)) from None
        try:
            yield sock
        finally:
            with contextlib.suppress(OSError), _locked(Path(path).parent):
                if os.path.samestat(os.lstat(path), os.fstat(file)):
                    os.unlink(path)
            os.close(file)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_stale(path: str) -> None:
    """Remove a socket's file where nobody listens. Raises ConfigurationError for what is in use."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise _unusable(path, "it exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(path)
    if code in (0, errno.EAGAIN):  # EAGAIN: more wait to be accepted than may
        raise _unusable(path, "another server listens there")
    if code != errno.ECONNREFUSED:
        raise OSError(code, os.strerror(code))
    os.unlink(path)


def _bind(sock: socket.socket, path: str) -> None:
    before = os.umask(UMASK)
    try:
        sock.bind(path)
    finally:
        os.umask(before)


def _unusable(path: str, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"cannot listen on the unix socket {path}: {reason}; choose another with --uds"
    )

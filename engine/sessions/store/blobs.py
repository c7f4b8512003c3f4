"""Blobs as files in `states/`, each named by the sha256 of its bytes: equal bytes are stored once.

A file appears there whole or not at all. The index says which blobs are referred to; callers hold
its lock while they adopt or remove a file.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from cottention.engine.errors import SnapshotError
from cottention.engine.sessions.store.folder_lock import sync_folder

PIECE_BYTES = 1 << 20
"""Of a file whose bytes are checked and not kept."""

DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Staged:
    """A blob that is written to the disk and not yet under its name."""

    path: Path
    digest: str
    nbytes: int


class Blobs:
    """The files. `num_bytes`: of all of them, once `sizes` has been called."""

    def __init__(self, folder: Path, *, durable: bool) -> None:
        self._folder = folder
        self._staging = folder / "new"
        self._durable = durable
        self.num_bytes = 0
        folder.mkdir(mode=0o700, exist_ok=True)
        self._staging.mkdir(mode=0o700, exist_ok=True)
        sync_folder(folder)
        sync_folder(folder.parent)

    @contextmanager
    def staged(self, *parts: bytes) -> Iterator[Staged]:
        """Write a blob of these parts; it is removed at the end of the block unless adopted."""
        path = self._staging / uuid4().hex
        checksum = hashlib.sha256()
        for part in parts:
            checksum.update(part)
        try:
            self._write(path, parts)
            yield Staged(path, checksum.hexdigest(), sum(map(len, parts)))
        finally:
            # it may be adopted already; a file that stays only takes space until the next start
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def adopt(self, staged: Staged) -> None:
        """Give a blob its name. A file of that name is replaced: it is equal, or damaged."""
        path = self._path(staged.digest)
        self._make_folder(path.parent)
        before = self._size(path)
        os.replace(staged.path, path)
        self.num_bytes += staged.nbytes - before
        if self._durable:
            sync_folder(path.parent)

    def read(self, digest: str) -> bytes:
        """A blob's bytes. SnapshotError: there is no such file, or its bytes have changed.

        OSError: it cannot be read now, and may be whole.
        """
        with self._opened(digest) as file:
            raw = file.read()
        _check(hashlib.sha256(raw).hexdigest(), digest)
        return raw

    def open(self, digest: str) -> BinaryIO:
        """A blob's file, whose bytes have been read in pieces and are as they were stored.

        Raises as `read` does.
        """
        file = self._opened(digest)
        try:
            checksum = hashlib.sha256()
            while piece := file.read(PIECE_BYTES):
                checksum.update(piece)
            _check(checksum.hexdigest(), digest)
        except BaseException:
            file.close()
            raise
        return file

    def remove(self, digest: str) -> None:
        """Remove a blob; nothing happens where there is none."""
        path = self._path(digest)
        # a file that cannot be removed only takes space: the next start tries again
        with suppress(OSError):
            size = self._size(path)
            path.unlink()
            self.num_bytes -= size

    def sizes(self) -> dict[str, int]:
        """Bytes of every blob by its digest. Removes files that a crash left half written."""
        for path in self._staging.iterdir():
            path.unlink()
        found: dict[str, int] = {}
        for folder in (path for path in self._folder.iterdir() if path.is_dir()):
            with os.scandir(folder) as entries:
                named = [entry for entry in entries if DIGEST.fullmatch(entry.name)]
                found.update((entry.name, entry.stat().st_size) for entry in named)
        self.num_bytes = sum(found.values())
        return found

    def _opened(self, digest: str) -> BinaryIO:
        path = self._path(digest)
        try:
            return open(path, "rb")
        except FileNotFoundError as error:
            if not self._staging.is_dir():  # the whole folder is gone, perhaps for a while
                raise
            raise SnapshotError(f"snapshot {digest} is missing") from error

    def _path(self, digest: str) -> Path:
        """Digests come from callers: only hex may become a path."""
        if not DIGEST.fullmatch(digest):
            raise SnapshotError("not a digest of a snapshot")
        return self._folder / digest[:2] / digest

    def _make_folder(self, folder: Path) -> None:
        """One of the 256, with the first file in it: most stores are small, and begin quickly."""
        if not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)
            if self._durable:
                sync_folder(self._folder)

    def _size(self, path: Path) -> int:
        return path.stat().st_size if path.exists() else 0

    def _write(self, path: Path, parts: Sequence[bytes]) -> None:
        with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.writelines(parts)
            file.flush()
            if self._durable:
                os.fsync(file.fileno())


def _check(found: str, digest: str) -> None:
    if found != digest:
        raise SnapshotError(f"snapshot {digest} is damaged on the disk")

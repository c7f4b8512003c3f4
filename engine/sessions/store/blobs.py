"""Snapshots as files, each named by the sha256 of its bytes: equal bytes are stored once.

Owns `states/`: how a file appears there whole or not at all. Does not know who refers to it; the
index does, and whoever adopts or removes a file holds the index's lock meanwhile.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from cottention.engine.errors import SnapshotError
from cottention.engine.sessions.store.folder_lock import sync_folder

DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Staged:
    """Bytes that are safe on the disk and have no name yet."""

    path: Path
    digest: str
    nbytes: int


class Blobs:
    """The files. `num_bytes`: of all of them, once `sizes` has been asked."""

    def __init__(self, folder: Path, *, durable: bool) -> None:
        self._folder = folder
        self._staging = folder / "new"
        self._durable = durable
        self.num_bytes = 0
        folder.mkdir(mode=0o700, exist_ok=True)
        # all folders at once: a file's folder need not be made durable beside the file
        for name in ("new", *(f"{byte:02x}" for byte in range(256))):
            (folder / name).mkdir(mode=0o700, exist_ok=True)
        sync_folder(folder)
        sync_folder(folder.parent)

    @contextmanager
    def staged(self, raw: bytes) -> Iterator[Staged]:
        """Write the bytes; what is not adopted within the block is gone after it."""
        path = self._staging / uuid4().hex
        try:
            self._write(path, raw)
            yield Staged(path, hashlib.sha256(raw).hexdigest(), len(raw))
        finally:
            path.unlink(missing_ok=True)

    def adopt(self, staged: Staged) -> None:
        """Give it its name. A file of that name is replaced: it is equal, or damaged."""
        path = self._path(staged.digest)
        before = self._size(path)
        os.replace(staged.path, path)
        self.num_bytes += staged.nbytes - before
        if self._durable:
            sync_folder(path.parent)

    def read(self, digest: str) -> bytes:
        """SnapshotError: no such file, or its bytes are not those of its name."""
        path = self._path(digest)
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise SnapshotError(f"snapshot {digest} cannot be read: {error.strerror}") from error
        if hashlib.sha256(raw).hexdigest() != digest:
            raise SnapshotError(f"snapshot {digest} is damaged on the disk")
        return raw

    def remove(self, digest: str) -> None:
        """Nothing happens where it is gone."""
        path = self._path(digest)
        size = self._size(path)
        # a file that cannot be removed costs space, no more: the next start tries again
        with suppress(OSError):
            path.unlink()
            self.num_bytes -= size

    def sizes(self) -> dict[str, int]:
        """Bytes of every file by its digest; what a crash left half written is removed."""
        for path in self._staging.iterdir():
            path.unlink()
        found: dict[str, int] = {}
        for folder in (path for path in self._folder.iterdir() if path.is_dir()):
            with os.scandir(folder) as entries:
                named = [entry for entry in entries if DIGEST.fullmatch(entry.name)]
                found.update((entry.name, entry.stat().st_size) for entry in named)
        self.num_bytes = sum(found.values())
        return found

    def _path(self, digest: str) -> Path:
        """Digests come from outside: nothing but hex may become a path."""
        if not DIGEST.fullmatch(digest):
            raise SnapshotError("not a digest of a snapshot")
        return self._folder / digest[:2] / digest

    def _size(self, path: Path) -> int:
        return path.stat().st_size if path.exists() else 0

    def _write(self, path: Path, raw: bytes) -> None:
        with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(raw)
            file.flush()
            if self._durable:
                os.fsync(file.fileno())

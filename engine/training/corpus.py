"""The text: which files, which of them are held out, and a hash that says it all.

Owns the choice of files and the split. Knows nothing of tokens.
"""

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cottention.engine.errors import ConfigurationError

LEFT_OUT_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
WRITTEN_BY_THE_BUILD = ("_sysconfigdata", "config-")
"""Names of files and folders that differ from machine to machine."""

HELD_OUT_ONE_IN = 20

CHARACTER_TABLES = "encodings/"
"""The standard library's character tables: so much alike that a model knows the held-out ones."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file: its path below the corpus folder, with forward slashes, and its text."""

    path: str
    text: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode("utf-8"))


@dataclass(frozen=True, slots=True)
class Corpus:
    """Training files, held-out files and the hash over the paths and contents of both."""

    training: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]
    sha256: str


def standard_library() -> Path:
    """Where the running interpreter keeps its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def read_corpus(folder: Path) -> Corpus:
    """Read `folder`'s Python files, sorted by path. Raises ConfigurationError if none are left."""
    files = tuple(_distinct(_source_files(folder)))
    held_out = tuple(file for file in files if is_held_out(file.path))
    training = tuple(file for file in files if not is_held_out(file.path))
    if not training or not held_out:
        raise ConfigurationError(
            f"{folder}: {len(training)} training and {len(held_out)} held-out Python files;"
            " both are needed"
        )
    return Corpus(training, held_out, corpus_hash(files))


def is_held_out(path: str) -> bool:
    """One file in twenty, by the SHA-256 of its path alone: the split never depends on a score."""
    digest = hashlib.sha256(path.encode("utf-8")).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def without_tables(files: Sequence[SourceFile]) -> tuple[SourceFile, ...]:
    """Files that are no character tables: what a score means for code that people write."""
    return tuple(file for file in files if not file.path.startswith(CHARACTER_TABLES))


def corpus_hash(files: Sequence[SourceFile]) -> str:
    """SHA-256 over each file's path and text, each ended by a zero byte, in the files' order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.path.encode("utf-8") + b"\0" + file.text.encode("utf-8") + b"\0")
    return digest.hexdigest()


def _source_files(folder: Path) -> Iterator[SourceFile]:
    """Every Python file that counts and is UTF-8, in the order of its path."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    for path in paths:
        if _counts(PurePosixPath(path)):
            try:
                yield SourceFile(path, (folder / path).read_bytes().decode("utf-8"))
            except UnicodeDecodeError:
                continue


def _counts(path: PurePosixPath) -> bool:
    if LEFT_OUT_FOLDERS.intersection(path.parts[:-1]):
        return False
    return not any(part.startswith(WRITTEN_BY_THE_BUILD) for part in path.parts)


def _distinct(files: Iterator[SourceFile]) -> Iterator[SourceFile]:
    """The first file of each text; empty ones are dropped."""
    seen = {""}
    for file in files:
        if file.text not in seen:
            seen.add(file.text)
            yield file

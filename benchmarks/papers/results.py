"""Results of finished runs, one JSON object by name of run; several processes may add to it."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path("docs/papers.json")

Result = dict[str, Any]


def read_results(path: Path = RESULTS) -> dict[str, Result]:
    """Results by name of run; empty where there is no file yet."""
    if not path.exists():
        return {}
    results: dict[str, Result] = json.loads(path.read_text(encoding="utf-8"))
    return results


def add_result(name: str, result: Result, path: Path) -> None:
    """Add one result, one line of the file; the file is replaced as a whole, sorted by name."""
    with _alone(path.parent):
        results = read_results(path) | {name: result}
        lines = [
            f"{json.dumps(key)}: {json.dumps(results[key], ensure_ascii=False)}"
            for key in sorted(results)
        ]
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        os.replace(unfinished, path)


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Hold a lock file; yields whether it was free. The lock ends with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for the lock of a folder and hold it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

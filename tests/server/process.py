"""`cottention serve` in a process of its own, for signals and restarts."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def served(
    model: Path,
    folder: Path | None,
    *flags: str,
    stderr: int | None = None,
    max_files: tuple[int, int] | None = None,
    module: str = "cottention.server",
) -> Iterator[tuple["subprocess.Popen[str]", httpx.Client]]:
    """A server of a model whose sessions are in a folder, or end with it; killed at the end.

    stderr: as subprocess has it; ours unless given. max_files: the soft and the hard limit of open
    files, ours unless given. module: what to run in place of `cottention`.
    """
    command = [sys.executable, "-m", module, "serve", str(model), "--port", "0"]
    command += [*flags, *(() if folder is None else ("--session-dir", str(folder)))]
    if max_files is not None:
        command = ["prlimit", "--nofile={}:{}".format(*max_files), *command]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True
    ) as popen:
        try:
            assert popen.stdout
            lines = iter(popen.stdout.readline, "")
            url = next(line.split()[-1] for line in lines if line.startswith("ready"))
            with httpx.Client(base_url=url, timeout=60) as client:
                yield popen, client
        finally:
            popen.kill()

"""How long the server takes to start, beside what torch alone takes to be imported.

By turns, each in a process of its own, in seconds from the start of the process: `import torch`;
`cottention serve` of the shipped model until it says that it is ready, and until the first token of
a streamed answer; `cottention --help`. Beside the time on the clock stands the process's own, which
other work on the machine changes little. The first turn, which fills the disk's cache and keeps the
modules' bytecode as an installation does, is left out.
"""

import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from typing import NamedTuple

import psutil

from benchmarks.common import Report, run, show

BODY = {"prompt": "def __init__(self, ", "max_tokens": 2, "stream": True}


class Seconds(NamedTuple):
    """On the clock, and of the processor in all threads of the process."""

    clock: float
    processor: float


def measure(quick: bool) -> Report:
    """Medians, and what each takes beyond torch in the same turn."""
    turns = [_turn() for _ in range(1 + (3 if quick else 9))][1:]
    rows = [_row(name, turns) for name in turns[0]]
    show(f"Start, seconds, medians of {len(turns)} turns", rows)
    return {"start": rows}


def _row(name: str, turns: list[dict[str, Seconds]]) -> dict[str, object]:
    row: dict[str, object] = {"what": name}
    for kind in Seconds._fields:
        taken = [getattr(turn[name], kind) for turn in turns]
        torch = [getattr(turn["import torch"], kind) for turn in turns]
        row[kind] = statistics.median(taken)
        row[f"{kind}, beyond torch"] = statistics.median(
            a - b for a, b in zip(taken, torch, strict=True)
        )
    return row


def _turn() -> dict[str, Seconds]:
    ready, first_token = _served()
    return {
        "import torch": _done("-c", "import torch; print()"),
        "serve, until ready": ready,
        "serve, until the first token": first_token,
        "cottention --help": _done("-m", "cottention.server", "--help"),
    }


def _started(*arguments: str) -> "tuple[subprocess.Popen[str], float]":
    start = time.perf_counter()
    command = [sys.executable, "-u", *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True), start


def _seconds(popen: "subprocess.Popen[str]", start: float) -> Seconds:
    """Until now."""
    used = psutil.Process(popen.pid).cpu_times()
    return Seconds(time.perf_counter() - start, used.user + used.system)


def _done(*arguments: str) -> Seconds:
    """Until the process has printed something, which it does at its end."""
    popen, start = _started(*arguments)
    with popen:
        assert popen.stdout
        popen.stdout.readline()
        return _seconds(popen, start)


def _served() -> tuple[Seconds, Seconds]:
    """Until the server is ready, and until the first event of a stream."""
    popen, start = _started("-m", "cottention.server", "serve", "--port", "0")
    with popen:
        try:
            assert popen.stdout
            url = next(line.split()[-1] for line in popen.stdout if line.startswith("ready"))
            ready = _seconds(popen, start)
            address = f"{url}/v1/completions"
            head = {"Content-Type": "application/json"}
            request = urllib.request.Request(address, json.dumps(BODY).encode(), head)
            with urllib.request.urlopen(request) as answer:
                assert answer.readline().startswith(b"data: ")
            return ready, _seconds(popen, start)
        finally:
            popen.kill()


if __name__ == "__main__":
    run(__doc__, measure)

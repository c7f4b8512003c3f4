"""How long the server takes to start, beside what torch alone takes to be imported.

By turns, each in a process of its own, in wall-clock seconds from the start of the process:
`import torch`; `cottention serve` of the shipped model until it says that it is ready, and until
the first token of a streamed answer; `cottention --help`. The first turn, which fills the disk's
cache, is left out.
"""

import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable

from benchmarks.common import Report, run, show

SERVE = [sys.executable, "-m", "cottention.server", "serve", "--port", "0"]
BODY = {"prompt": "def __init__(self, ", "max_tokens": 2, "stream": True}


def measure(quick: bool) -> Report:
    """Medians, and what the server takes beyond torch."""
    turns = [_turn() for _ in range(1 + (3 if quick else 9))][1:]
    names = list(turns[0])
    rows = [
        {
            "what": name,
            "seconds": statistics.median(turn[name] for turn in turns),
            "beyond import torch": statistics.median(
                turn[name] - turn["import torch"] for turn in turns
            ),
        }
        for name in names
    ]
    show(f"Start, medians of {len(turns)} turns", rows)
    return {"start": rows}


def _turn() -> dict[str, float]:
    ready, first_token = _served()
    return {
        "import torch": _seconds(lambda: _run("-c", "import torch")),
        "serve, until ready": ready,
        "serve, until the first token": first_token,
        "cottention --help": _seconds(lambda: _run("-m", "cottention.server", "--help")),
    }


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)


def _served() -> tuple[float, float]:
    """Seconds until the server is ready, and until the first event of a stream."""
    start = time.perf_counter()
    with subprocess.Popen(
        SERVE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    ) as popen:
        try:
            assert popen.stdout
            url = next(line.split()[-1] for line in popen.stdout if line.startswith("ready"))
            ready = time.perf_counter() - start
            request = urllib.request.Request(
                f"{url}/v1/completions",
                json.dumps(BODY).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request) as answer:
                assert answer.readline().startswith(b"data: ")
            return ready, time.perf_counter() - start
        finally:
            popen.kill()


if __name__ == "__main__":
    run(__doc__, measure)

"""A chain of responses over HTTP: what each takes of time and of the disk, from first to last.

Each goes on from the one before by `previous_response_id`; a server process keeps them in a folder.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from benchmarks.common import Report, run, show
from benchmarks.serving import port_of

NUM_RESPONSES = 500
NUM_TOKENS = 16
PARTS = 10


def measure(quick: bool) -> Report:
    """A row for each tenth of the chain."""
    num = 50 if quick else NUM_RESPONSES
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "cottention.server", "serve", "--port", "0"]
        command += ["--chat-template", "plain", "--session-dir", folder]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        with subprocess.Popen(command, **pipes) as server:
            try:
                rows = _rows(f"http://127.0.0.1:{port_of(server)}", Path(folder), num)
            finally:
                server.terminate()
    show(f"A chain of {num} responses of {NUM_TOKENS} tokens", rows)
    return {"response_chain": rows}


def _rows(url: str, folder: Path, num: int) -> list[Report]:
    rows: list[Report] = []
    previous, before = None, _bytes_in(folder)
    for first in range(0, num, num // PARTS):
        seconds = []
        for number in range(first, first + num // PARTS):
            start = time.perf_counter()
            response = _ask(url, previous, number)
            seconds.append((time.perf_counter() - start) / response["usage"]["output_tokens"])
            previous = response["id"]
        after = _bytes_in(folder)
        rows.append(
            {
                "responses": f"{first + 1}-{first + len(seconds)}",
                "tokens held": response["usage"]["total_tokens"],
                "ms per token": 1000 * statistics.median(seconds),
                "bytes each": (after - before) // len(seconds),
            }
        )
        before = after
    return rows


def _ask(url: str, previous: str | None, seed: int) -> Any:
    body = {"input": "go on", "previous_response_id": previous, "seed": seed}
    body |= {"max_output_tokens": NUM_TOKENS, "temperature": 1.5}
    headers = {"Content-Type": "application/json"}
    request = Request(f"{url}/v1/responses", json.dumps(body).encode(), headers)
    with urlopen(request) as answer:
        return json.load(answer)


def _bytes_in(folder: Path) -> int:
    """Of the blobs: those of the index grow and shrink by whole pages."""
    return sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())


if __name__ == "__main__":
    run(__doc__, measure)

"""Time between tokens of running streams while a long prompt is prefilled.

Measured by a client on plain sockets against a real server: before the long prompt is sent, and
from then until its first token.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from itertools import pairwise

import uvloop

from benchmarks.common import Report, percentile, run, show
from benchmarks.serving import Arrivals, Reader, port_of

STREAMS = 16
WARMUP_TOKENS = 400
"""Tokens that each stream receives before the long prompt is sent."""

SHORT = {"prompt": [5], "max_tokens": 100_000, "temperature": 0, "ignore_eos": True, "stream": True}


def measure(quick: bool) -> Report:
    """One row for each limit of prompt tokens per step."""
    length = 4096 if quick else 32_768
    rows = [_row(length, flags) for flags in ([], ["--max-prefill-tokens", "512"])]
    show(f"{STREAMS} streams of the default model during prefill of {length:,} tokens", rows)
    return {"long_prefill": rows}


def _row(length: int, flags: list[str]) -> dict[str, object]:
    command = [
        sys.executable,
        "-m",
        "cottention.server",
        "serve",
        "--port",
        "0",
        "--prefix-cache-bytes",
        "0",
    ]
    command += ["--generation-config", "vllm"]  # greedy without the model's penalty
    command += ["--context-policy", "exact"]  # renewal prefills the end of the prompt only
    with subprocess.Popen(
        [*command, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as server:
        try:
            streams, long = uvloop.run(_measure(port_of(server), length))
        finally:
            server.terminate()
    before = percentile(_gaps(streams, 0, long.sent), 99)
    during = percentile(_gaps(streams, long.sent, long.events[0]), 99)
    return {
        "max prefill tokens": flags[-1] if flags else "default",
        "before p99 ms": before,
        "during p99 ms": during,
        "during / before": during / before,
        "prefill s": long.events[0] - long.sent,
    }


async def _measure(port: int, length: int) -> tuple[list[Arrivals], Arrivals]:
    opened = [await _open(port, SHORT) for _ in range(STREAMS)]
    streams = [arrivals for _, arrivals in opened]
    while min(len(one.events) for one in streams) < WARMUP_TOKENS:
        await asyncio.sleep(0.01)
    prompt = [1 + place % 1000 for place in range(length)]
    _, long = await _open(port, {**SHORT, "prompt": prompt, "max_tokens": 1})
    while not long.events:
        await asyncio.sleep(0.01)
    return streams, long


async def _open(port: int, body: dict[str, object]) -> tuple[asyncio.BaseTransport, Arrivals]:
    """Send a request; the times of its events are recorded."""
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
    arrivals = Arrivals(time.perf_counter())
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(lambda: Reader(arrivals), "127.0.0.1", port)
    arrivals.sent = time.perf_counter()
    transport.write(head.encode() + raw)
    return transport, arrivals


def _gaps(streams: list[Arrivals], begin: float, end: float) -> list[float]:
    """Milliseconds between consecutive tokens of each stream, of those between two times."""
    gaps = []
    for one in streams:
        times = [each for each in one.events[8:] if begin <= each <= end]
        gaps += [1e3 * (b - a) for a, b in pairwise(times)]
    return gaps


if __name__ == "__main__":
    run(__doc__, measure)

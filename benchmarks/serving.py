"""Throughput, CPU time and latency of the default model, in-process and over HTTP.

CPU time is that of the server process, over all its threads. The HTTP client runs on the same cores
and would take time from the server, so it only counts server-sent events in the bytes of plain
sockets and parses neither HTTP nor JSON.
"""

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.request import Request, urlopen

import psutil
import uvloop

from benchmarks.common import Report, percentile, run, show
from cottention.engine import Engine, EngineConfig, SamplingParams

STREAMS = (1, 8, 64)
PROMPT = "def __init__(self, "
EVENT = b"data: {"

NUM_FIRST = 20
PAUSE_SECONDS = 0.02
"""Before each of the requests whose first token is measured: nothing else runs."""


def measure(quick: bool) -> Report:
    """One row for each number of streams; all streams generate equally many tokens."""
    num_tokens = 100 if quick else 500
    local = {streams: _in_process(streams, num_tokens) for streams in STREAMS}
    remote = _over_http(num_tokens)
    rows = [_row(num_tokens, local[streams], remote.streams[streams]) for streams in STREAMS]
    show(f"Serving the default model, {num_tokens} tokens per stream, greedy, float32", rows)
    first = _first_row(_idle_steps(), remote.first)
    show(f"First token of an idle server, p50 of {NUM_FIRST}", [first])
    return {"serving": rows, "first token": [first]}


class Local(NamedTuple):
    """The engine alone: tokens per second, and seconds of CPU time per token."""

    speed: float
    cpu: float


def _in_process(streams: int, num_tokens: int) -> Local:
    engine = Engine(config=EngineConfig(max_slots=streams))
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    engine.generate([PROMPT] * streams, SamplingParams(max_tokens=8, temperature=0))
    start, start_cpu = time.perf_counter(), time.process_time()
    engine.generate([PROMPT] * streams, params)
    took, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    return Local(streams * num_tokens / took, cpu / (streams * num_tokens))


def _idle_steps() -> list[tuple[float, float]]:
    """Seconds of the first step of a request, its prompt's, and of its second, after a pause."""
    engine = Engine(config=EngineConfig(max_slots=64))
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    ids = engine.tokenizer.encode(PROMPT)
    steps = []
    for _ in range(NUM_FIRST):
        time.sleep(PAUSE_SECONDS)
        engine.submit(ids, params)
        start = time.perf_counter()
        engine.step()
        between = time.perf_counter()
        engine.step()
        steps.append((between - start, time.perf_counter() - between))
    return steps


@dataclass(slots=True)
class Arrivals:
    """When the request was sent and its events arrived, in seconds."""

    sent: float
    events: list[float] = field(default_factory=list)


class Remote(NamedTuple):
    """Streams over HTTP; `cpu` is seconds of the server's CPU time per token."""

    arrivals: list[Arrivals]
    cpu: float


class Served(NamedTuple):
    """By number of streams, and a stream each that an idle server was asked for after a pause."""

    streams: dict[int, Remote]
    first: list[Arrivals]


def _over_http(num_tokens: int) -> Served:
    """Streams against a server in its own process, on a free port."""
    command = [
        sys.executable,
        "-m",
        "cottention.server",
        "serve",
        "--port",
        "0",
        "--max-slots",
        "64",
    ]
    command += ["--generation-config", "vllm"]  # greedy without the model's penalty
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as server:
        try:
            port = port_of(server)
            check(port)
            uvloop.run(_streams(port, 8, 8))
            process = psutil.Process(server.pid)
            streams = {n: _measured(process, port, n, num_tokens) for n in STREAMS}
            return Served(streams, [_idle_request(port) for _ in range(NUM_FIRST)])
        finally:
            server.terminate()


def check(port: int) -> None:
    """Exit unless the server's text is that of its engine."""
    params = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
    (expected,) = Engine(config=EngineConfig(max_slots=1)).generate([PROMPT], params)
    headers = {"Content-Type": "application/json"}
    url, body = f"http://127.0.0.1:{port}/v1/completions", _body(64, stream=False)
    with urlopen(Request(url, body, headers)) as answer:
        text = json.load(answer)["choices"][0]["text"]
    if text != expected.text:
        raise SystemExit("the server's text differs from its engine's: nothing is reported")


def _measured(server: psutil.Process, port: int, streams: int, num_tokens: int) -> Remote:
    before = server.cpu_times()
    arrivals = uvloop.run(_streams(port, streams, num_tokens))
    after = server.cpu_times()
    spent = after.user + after.system - before.user - before.system
    return Remote(arrivals, spent / (streams * num_tokens))


def _idle_request(port: int) -> Arrivals:
    time.sleep(PAUSE_SECONDS)
    [arrivals] = uvloop.run(_streams(port, 1, 2))
    return arrivals


def port_of(server: "subprocess.Popen[str]") -> int:
    """The port that the server reports on stdout."""
    assert server.stdout is not None
    for line in server.stdout:
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        if found:
            return int(found[1])
    raise SystemExit("the server did not start")


async def _streams(port: int, streams: int, num_tokens: int) -> list[Arrivals]:
    return await asyncio.gather(*(_stream(port, num_tokens) for _ in range(streams)))


async def _stream(port: int, num_tokens: int) -> Arrivals:
    """One request; records the time of each event."""
    arrivals = Arrivals(time.perf_counter())
    loop = asyncio.get_running_loop()
    transport, reader = await loop.create_connection(lambda: Reader(arrivals), "127.0.0.1", port)
    transport.write(_request(port, num_tokens))
    await reader.ended
    return arrivals


def _request(port: int, num_tokens: int) -> bytes:
    body = _body(num_tokens, stream=True)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _body(num_tokens: int, *, stream: bool) -> bytes:
    wanted = {"max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
    return json.dumps({"prompt": PROMPT, **wanted}).encode()


class Reader(asyncio.Protocol):
    """Counts events in the received bytes, also those split over two reads."""

    def __init__(self, arrivals: Arrivals) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        self._arrivals = arrivals
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        """Record the time once for each event that begins here."""
        found = self._rest + data
        self._arrivals.events += [time.perf_counter()] * found.count(EVENT)
        self._rest = found[1 - len(EVENT) :]

    def connection_lost(self, _error: Exception | None) -> None:
        """The response is complete: the request asked the server to close."""
        self.ended.set_result(None)


def _row(num_tokens: int, local: Local, remote: Remote) -> dict[str, object]:
    arrivals = remote.arrivals
    seconds = max(one.events[-1] for one in arrivals) - min(one.sent for one in arrivals)
    speed = len(arrivals) * num_tokens / seconds
    return {
        "streams": len(arrivals),
        "in-process tok/s": local.speed,
        "HTTP tok/s": speed,
        "HTTP / in-process": speed / local.speed,
        "in-process CPU us/tok": 1e6 * local.cpu,
        "server CPU us/tok": 1e6 * remote.cpu,
        "server / in-process": remote.cpu / local.cpu,
        **_latencies(arrivals),
    }


def _first_row(steps: list[tuple[float, float]], arrivals: list[Arrivals]) -> dict[str, object]:
    prompts, nexts = zip(*steps, strict=True)
    prompt, following = 1e3 * statistics.median(prompts), 1e3 * statistics.median(nexts)
    first = 1e3 * statistics.median(one.events[0] - one.sent for one in arrivals)
    return {
        "in-process prompt's step ms": prompt,
        "next step ms": following,
        "HTTP first token ms": first,
        "beyond both steps ms": first - prompt - following,
    }


def _latencies(arrivals: list[Arrivals]) -> dict[str, object]:
    first = [1e3 * (one.events[0] - one.sent) for one in arrivals]
    gaps = [
        1e3 * (b - a) for one in arrivals for a, b in zip(one.events, one.events[1:], strict=False)
    ]
    return {
        "first token ms p50": statistics.median(first),
        "inter-token ms p50": statistics.median(gaps),
        "inter-token ms p99": percentile(gaps, 99),
    }


if __name__ == "__main__":
    run(__doc__, measure)

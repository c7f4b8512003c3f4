"""Twice as much work as the server can do, from two hundred clients of whom a third misbehave.

Every answer is compared with what the engine says alone in this process (float32 on a CPU), and the
server's slots, threads, file descriptors and memory are watched. Ends with 1 where a bar is missed;
the one on memory counts from 25 minutes on.
"""

import asyncio
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import uvloop

from benchmarks.common import Report, machine, parser, percentile, show, write_json
from benchmarks.serving import port_of
from benchmarks.soak_clients import Body, Client, Heard, bodies
from cottention.engine import Engine, EngineConfig, SamplingParams

SLOTS = 16
QUEUE = 32
NUM_BODIES = 400
WARM_SECONDS = 10.0
SETTLE_SECONDS = 60.0
"""Longest wait for what runs to end, and for connections that linger to be closed."""
MISBEHAVING = ("leave", "stall", "garbage")

MAX_REFUSAL_MS = 50.0
MAX_DRIFT_MB = 5.0
POOL_THREADS = min(32, (os.cpu_count() or 1) + 4)
"""asyncio's own bound on the pool of `to_thread`."""
MIN_MINUTES = 25.0
"""Shorter runs say nothing of memory."""


class Sample(NamedTuple):
    """The server's process at a moment."""

    at: float
    resident: int
    num_threads: int
    num_fds: int


def main() -> int:
    """Run, print, write; the exit status."""
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=30.0, help="default: 30")
    options.add_argument("--clients", type=int, default=200, help="default: 200")
    options.add_argument("--model", help="default: the one that ships")
    given = options.parse_args()
    minutes = 0.25 if given.quick else given.minutes
    report = soak(minutes, given.clients, given.model)
    show(f"Soak of {minutes:g} minutes with {given.clients} clients", [report])
    if given.json:
        write_json(given.json, {"machine": machine(), "soak": report})
    return 0 if report["passed"] else 1


def soak(minutes: float, num_clients: int, model: str | None) -> Report:
    """All of it, against a server in a process of its own."""
    chance = random.Random(0)
    alone = Engine(model, EngineConfig(max_slots=1, prefix_cache_bytes=0))
    wanted = bodies(NUM_BODIES, alone.tokenizer.num_ids, chance)
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "wb") as log:
        command = [sys.executable, "-m", "cottention.server", "serve", *([model] if model else [])]
        command += ["--port", "0", "--max-slots", str(SLOTS), "--max-queued-requests", str(QUEUE)]
        command += ["--session-dir", f"{folder}/sessions", "--log-level", "error"]
        command += ["--prefix-cache-bytes", "32M", "--session-memory", "16M"]  # soon full
        command += ["--stream-buffer-bytes", "4K", "--dtype", "float32", "--device", "cpu"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as server:
            try:
                port = port_of(server)
                heard, samples = uvloop.run(_load(port, server.pid, wanted, minutes, num_clients))
                num_leaked = _figure(port, "num_slots") - _figure(port, "num_free_slots")
            finally:
                server.terminate()
    wrong = num_wrong(wanted, heard, alone)
    return _report(heard, samples, wrong, num_leaked, minutes)


async def _load(
    port: int, pid: int, wanted: Sequence[Body], minutes: float, num_clients: int
) -> tuple[Heard, list[Sample]]:
    """Warm up and find the capacity, then ask for twice as much; the process, before to after."""
    process, chance = psutil.Process(pid), random.Random(1)
    warm = Heard()
    seconds = min(WARM_SECONDS, 30 * minutes)
    until = time.monotonic() + seconds
    clients = [Client(port, wanted, warm, random.Random(n)) for n in range(SLOTS)]
    await asyncio.gather(*(client.run("behave", 0.01, until) for client in clients))
    pause = num_clients * seconds / (2 * len(warm.whole))
    samples = [await _settled(port, process)]
    heard, until = Heard(), time.monotonic() + 60 * minutes
    watching = asyncio.create_task(_watch(process, samples, 60 * minutes / 60))
    kinds = [MISBEHAVING[n // 3 % 3] if n % 3 == 0 else "behave" for n in range(num_clients)]
    await asyncio.gather(
        *(
            Client(port, wanted, heard, random.Random(chance.random())).run(kind, pause, until)
            for kind in kinds
        )
    )
    watching.cancel()
    samples.append(await _settled(port, process))
    return heard, samples


async def _watch(process: psutil.Process, samples: list[Sample], seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        samples.append(_sample(process))


def _sample(process: psutil.Process) -> Sample:
    with process.oneshot():
        fds, threads = process.num_fds(), process.num_threads()
        return Sample(time.monotonic(), process.memory_info().rss, threads, fds)


async def _settled(port: int, process: psutil.Process) -> Sample:
    """The process when nothing runs and its descriptors have been as many for three seconds."""
    until, num_same, before = time.monotonic() + SETTLE_SECONDS, 0, _sample(process)
    while num_same < 10 and time.monotonic() < until:
        await asyncio.sleep(0.3)
        busy, sample = await asyncio.to_thread(_num_busy, port), _sample(process)
        num_same = 0 if busy or sample.num_fds != before.num_fds else num_same + 1
        before = sample
    return before


def _num_busy(port: int) -> float:
    names = ("num_requests_running", "num_requests_waiting", "num_requests_paused")
    return sum(_figure(port, name) for name in names)


def _figure(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        found = re.search(rf"^cottention:{name}{{.*}} (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found, name
    return float(found[1])


def num_wrong(wanted: Sequence[Body], heard: Heard, alone: Engine) -> int:
    """Answers that differ from what the engine says alone, as far as they were read."""
    said: dict[int, tuple[int, ...]] = {}
    for number in sorted({number for number, _ in heard.whole + heard.parts}):
        body = {key: each for key, each in wanted[number].items() if key != "return_token_ids"}
        prompt = body.pop("prompt")
        said[number] = alone.generate([prompt], SamplingParams(**body))[0].token_ids
    whole = sum(ids != said[number] for number, ids in heard.whole)
    return whole + sum(ids != said[number][: len(ids)] for number, ids in heard.parts)


def _report(
    heard: Heard, samples: Sequence[Sample], wrong: int, num_leaked: float, minutes: float
) -> Report:
    before, after = samples[0], samples[-1]
    early = [each for each in samples if each.at <= _two_thirds(samples)]
    late = [each.resident / 2**20 for each in samples[len(early) :]]
    # The event loop's pool starts a thread when all are busy, up to a bound, and ends none.
    num_threads = before.num_threads + POOL_THREADS
    drift = (max(late) - min(late)) / 2
    refused = [1000 * each for each in heard.refused_seconds]
    refusal = percentile(refused, 99) if len(refused) > 1 else 0.0
    report: Report = {
        "whole answers": len(heard.whole),
        "parts": len(heard.parts),
        "refused": len(refused),
        "wrong": wrong,
        "faults": dict(heard.faults),
        "leaked slots": int(num_leaked),
        "threads +": after.num_threads - num_threads,
        "fds +": after.num_fds - before.num_fds,
        "resident MB": late[-1],
        "last 2/3 +- MB": drift,
        "refusal p99 ms": refusal,
    }
    leaks = max(report["leaked slots"], report["threads +"], report["fds +"])
    is_steady = minutes < MIN_MINUTES or drift <= MAX_DRIFT_MB
    is_right = wrong == 0 and leaks <= 0 and not heard.faults and bool(heard.whole)
    report["passed"] = is_right and is_steady and refusal <= MAX_REFUSAL_MS
    return report


def _two_thirds(samples: Sequence[Sample]) -> float:
    """When the last two thirds of the time begin."""
    first, last = samples[0].at, samples[-1].at
    return first + (last - first) / 3


if __name__ == "__main__":
    sys.exit(main())

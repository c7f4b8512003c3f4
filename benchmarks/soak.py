"""Soak test: twice the load that the server can handle, from clients of which a third misbehave.

Every response is compared with that of an engine in this process (float32 on the CPU); slots,
threads, file descriptors and memory of the server are monitored. Exits with 1 if a limit is
exceeded; the memory limit applies to runs of 25 minutes or more.
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
from benchmarks.soak_clients import Body, Client, Responses, bodies
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
"""Minimum duration for the limit on memory."""


class Sample(NamedTuple):
    """The server process at one time."""

    at: float
    resident: int
    num_threads: int
    num_fds: int


def main() -> int:
    """Run the soak test; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=30.0, help="duration (default: 30)")
    options.add_argument("--clients", type=int, default=200, help="clients (default: 200)")
    options.add_argument("--model", help="model folder or id (default: the model that ships)")
    given = options.parse_args()
    minutes = 0.25 if given.quick else given.minutes
    report = soak(minutes, given.clients, given.model)
    show(f"Soak of {minutes:g} minutes with {given.clients} clients", [report])
    if given.json:
        write_json(given.json, {"machine": machine(), "soak": report})
    return 0 if report["passed"] else 1


def soak(minutes: float, num_clients: int, model: str | None) -> Report:
    """Run the load against a server in its own process."""
    chance = random.Random(0)
    engine = Engine(model, EngineConfig(max_slots=1, prefix_cache_bytes=0))
    wanted = bodies(NUM_BODIES, engine.tokenizer.num_ids, chance)
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "wb") as log:
        command = [sys.executable, "-m", "cottention.server", "serve", *([model] if model else [])]
        command += ["--generation-config", "vllm"]  # the parameters of the engine in this process
        command += ["--port", "0", "--max-slots", str(SLOTS), "--max-queued-requests", str(QUEUE)]
        command += ["--session-dir", f"{folder}/sessions", "--log-level", "error"]
        # small enough to fill up
        command += ["--prefix-cache-bytes", "32M", "--session-memory", "16M"]
        command += ["--stream-buffer-bytes", "4K", "--dtype", "float32", "--device", "cpu"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as server:
            try:
                port = port_of(server)
                responses, samples = uvloop.run(
                    _load(port, server.pid, wanted, minutes, num_clients)
                )
                num_leaked = _figure(port, "num_slots") - _figure(port, "num_free_slots")
            finally:
                server.terminate()
    wrong = num_wrong(wanted, responses, engine)
    return _report(responses, samples, wrong, num_leaked, minutes)


async def _load(
    port: int, pid: int, wanted: Sequence[Body], minutes: float, num_clients: int
) -> tuple[Responses, list[Sample]]:
    """Measure the capacity, then apply twice that load; also samples the server process."""
    process, chance = psutil.Process(pid), random.Random(1)
    warm = Responses()
    seconds = min(WARM_SECONDS, 30 * minutes)
    until = time.monotonic() + seconds
    clients = [Client(port, wanted, warm, random.Random(n)) for n in range(SLOTS)]
    await asyncio.gather(*(client.run("behave", 0.01, until) for client in clients))
    pause = num_clients * seconds / (2 * len(warm.whole))
    samples = [await _settled(port, process)]
    responses, until = Responses(), time.monotonic() + 60 * minutes
    watching = asyncio.create_task(_watch(process, samples, 60 * minutes / 60))
    kinds = [MISBEHAVING[n // 3 % 3] if n % 3 == 0 else "behave" for n in range(num_clients)]
    await asyncio.gather(
        *(
            Client(port, wanted, responses, random.Random(chance.random())).run(kind, pause, until)
            for kind in kinds
        )
    )
    watching.cancel()
    samples.append(await _settled(port, process))
    return responses, samples


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


def num_wrong(wanted: Sequence[Body], responses: Responses, engine: Engine) -> int:
    """Number of responses that differ from the engine's, as far as they were read."""
    expected: dict[int, tuple[int, ...]] = {}
    for number in sorted({number for number, _ in responses.whole + responses.parts}):
        body = {key: each for key, each in wanted[number].items() if key != "return_token_ids"}
        prompt = body.pop("prompt")
        expected[number] = engine.generate([prompt], SamplingParams(**body))[0].token_ids
    whole = sum(ids != expected[number] for number, ids in responses.whole)
    return whole + sum(ids != expected[number][: len(ids)] for number, ids in responses.parts)


def _report(
    responses: Responses, samples: Sequence[Sample], wrong: int, num_leaked: float, minutes: float
) -> Report:
    before, after = samples[0], samples[-1]
    early = [each for each in samples if each.at <= _two_thirds(samples)]
    late = [each.resident / 2**20 for each in samples[len(early) :]]
    # The event loop's pool starts a thread when all are busy, up to a bound, and ends none.
    num_threads = before.num_threads + POOL_THREADS
    drift = (max(late) - min(late)) / 2
    refused = [1000 * each for each in responses.refused_seconds]
    refusal = percentile(refused, 99) if len(refused) > 1 else 0.0
    report: Report = {
        "whole answers": len(responses.whole),
        "parts": len(responses.parts),
        "refused": len(refused),
        "wrong": wrong,
        "faults": dict(responses.faults),
        "leaked slots": int(num_leaked),
        "threads +": after.num_threads - num_threads,
        "fds +": after.num_fds - before.num_fds,
        "resident MB": late[-1],
        "last 2/3 +- MB": drift,
        "refusal p99 ms": refusal,
    }
    leaks = max(report["leaked slots"], report["threads +"], report["fds +"])
    is_steady = minutes < MIN_MINUTES or drift <= MAX_DRIFT_MB
    is_right = wrong == 0 and leaks <= 0 and not responses.faults and bool(responses.whole)
    report["passed"] = is_right and is_steady and refusal <= MAX_REFUSAL_MS
    return report


def _two_thirds(samples: Sequence[Sample]) -> float:
    """The time at which the last two thirds of the run begin."""
    first, last = samples[0].at, samples[-1].at
    return first + (last - first) / 3


if __name__ == "__main__":
    sys.exit(main())

"""Whether one client can keep another from being served: `make bounds`.

One key sends every request of the API with every field at its documented maximum
(`bounds_requests`), several at once. Meanwhile a second key asks for 16 tokens every 100 ms, and
somebody for /health. Bounds: the second key's p99 is at most 4 times its quiet value in the same
run plus 50 ms, /health takes at most 250 ms, everything is answered, and the server's resident
memory stays within the sum of docs/operations.md for its settings.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import httpx
import psutil

from benchmarks.bounds_memory import Settings, memory_sum
from benchmarks.bounds_requests import Asked, Description
from benchmarks.common import parser, percentile, show, write_json

FIRST, SECOND = "the-first-key", "the-second-key"
EVERY = 0.1
END = b"Host: localhost\r\nConnection: close\r\n"
HEALTH = b"GET /health HTTP/1.1\r\n" + END + b"\r\n"
BODY = b'{"prompt": "def f(x):", "max_tokens": 16, "ignore_eos": true, "temperature": 0}'
ASKED = (
    b"POST /v1/completions HTTP/1.1\r\n%bAuthorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b"
    % (END, SECOND.encode(), len(BODY), BODY)
)
"""What the second key asks for, and somebody."""
PATIENCE = 60.0
"""Seconds after which a request of the second key counts as not served."""

MAX_FACTOR, MAX_MORE, MAX_HEALTH = 4.0, 0.05, 0.25


class Probe(NamedTuple):
    """A request of the second key or of /health: when it was sent, seconds, status (0: none)."""

    sent: float
    seconds: float
    status: int


class Sent(NamedTuple):
    """Equal requests that were sent at once: from when to when, and how they ended."""

    label: str
    began: float
    ended: float
    statuses: dict[str, int]


@dataclass
class Probes:
    """What has been asked every EVERY seconds, and how late: a busy machine delays that as well."""

    second: list[Probe] = field(default_factory=list)
    health: list[Probe] = field(default_factory=list)
    rss: list[tuple[float, int]] = field(default_factory=list)
    lateness: list[float] = field(default_factory=list)


class Prober:
    """Asks as the second key and for /health until it is stopped, and samples the memory."""

    def __init__(self, url: str, pid: int) -> None:
        parts = httpx.URL(url)
        self._address = (parts.host, parts.port)
        self._process = psutil.Process(pid)
        self._stop = threading.Event()
        self.probes = Probes()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> "Prober":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    async def _run(self) -> None:
        tasks: set[asyncio.Task[None]] = set()
        due = time.monotonic()
        while not self._stop.is_set():
            for raw, kept in ((ASKED, self.probes.second), (HEALTH, self.probes.health)):
                tasks.add(task := asyncio.create_task(self._ask(raw, kept)))
                task.add_done_callback(tasks.discard)
            self.probes.rss.append((time.monotonic(), self._process.memory_info().rss))
            due += EVERY
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self.probes.lateness.append(max(0.0, time.monotonic() - due))
        await asyncio.gather(*tasks)

    async def _ask(self, raw: bytes, kept: list[Probe]) -> None:
        """Over a connection of its own, without an HTTP client, which would take the time."""
        sent, status = time.monotonic(), 0
        with contextlib.suppress(OSError, ValueError, TimeoutError):
            async with asyncio.timeout(PATIENCE):
                reader, writer = await asyncio.open_connection(*self._address)
                writer.write(raw)
                answer = await reader.read(-1)
                writer.close()
                status = int(answer[9:12])
        kept.append(Probe(sent, time.monotonic() - sent, status))


def attack(
    url: str, snapshot: bytes, settings: Settings, at_once: int, seconds: float, to: Connection
) -> None:
    """Send every request, `at_once` at a time, and leave after `seconds` where it goes on."""
    os.nice(5)  # the second key's client shares the machine
    asyncio.run(_attack(url, snapshot, settings, at_once, seconds, to))


async def _attack(
    url: str, snapshot: bytes, settings: Settings, at_once: int, seconds: float, to: Connection
) -> None:
    headers = {"authorization": f"Bearer {FIRST}"}
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, headers=headers) as client:
        description = (await client.get("/openapi.json")).json()
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        session_id = await _session(client)
        paths = {"session_id": session_id, "model_id": model}
        to.send(None)  # what follows is what is measured: not the start of this process
        made = Description(description, settings.max_body_bytes, paths, snapshot)
        for asked in made.requests():
            if asked.method == "DELETE":
                own = await _session(client)
                asked = asked._replace(target=asked.target.replace(session_id, own))
            began = time.monotonic()
            found = await asyncio.gather(*(_send(client, asked, seconds) for _ in range(at_once)))
            to.send(Sent(asked.label, began, time.monotonic(), dict(Counter(found))))
    to.close()


async def _session(client: httpx.AsyncClient) -> str:
    for _ in range(100):
        made = await client.post("/v1/sessions", json={"prompt": "def f(x):"})
        if made.is_success:
            return str(made.json()["id"])
        await asyncio.sleep(0.2)
    raise SystemExit(f"no session could be made: {made.text}")


async def _send(client: httpx.AsyncClient, asked: Asked, seconds: float) -> str:
    """The status, or how it ended without; the answer is read and not kept."""
    try:
        async with (
            asyncio.timeout(seconds),
            client.stream(
                asked.method, asked.target, headers=asked.headers, content=asked.body
            ) as answer,
        ):
            async for _ in answer.aiter_raw():
                pass
            return str(answer.status_code)
    except TimeoutError:
        return "left"
    except httpx.HTTPError as error:
        return type(error).__name__


@contextlib.contextmanager
def server(settings: Settings, flags: Sequence[str]) -> Iterator[tuple[str, int]]:
    """A server with two keys: its URL and its process."""
    with TemporaryDirectory(prefix="cottention-bounds-") as folder:
        keys = ("--api-key", FIRST, "--api-key", SECOND)
        command = [sys.executable, "-m", "cottention.server", "serve", *settings.model]
        command += ["--generation-config", "vllm"]
        command += ["--port", "0", "--session-dir", folder, *keys, *settings.flags(), *flags]
        log = Path(folder, "log")
        with (
            log.open("w") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as popen,
        ):
            try:
                assert popen.stdout
                lines = iter(popen.stdout.readline, "")
                url = next((line.split()[-1] for line in lines if line.startswith("ready")), None)
                if url is None:
                    raise SystemExit(log.read_text())
                yield url, popen.pid
            finally:
                popen.kill()


def run_bounds(settings: Settings, flags: Sequence[str], at_once: int, seconds: float) -> Any:
    """The figures of one run."""
    with server(settings, flags) as (url, pid):
        client = httpx.Client(
            base_url=url, timeout=PATIENCE, headers={"authorization": f"Bearer {FIRST}"}
        )
        with client:
            session_id = client.post("/v1/sessions", json={"prompt": "def f(x):"}).json()["id"]
            body = {"prompt": "x", "session_id": session_id, "max_tokens": 8}
            client.post("/v1/completions", json=body)
            snapshot = client.get(f"/v1/sessions/{session_id}/snapshot").content
            capacity = client.get("/v1/capacity").json()
        at_rest = psutil.Process(pid).memory_info().rss
        with Prober(url, pid) as quiet:
            time.sleep(max(2.0, 4 * seconds))
        sent: list[Sent] = []
        here, there = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("spawn")
        arguments = (url, snapshot, settings, at_once, seconds, there)
        attacker = context.Process(target=attack, args=arguments)
        attacker.start()
        there.close()
        here.recv()
        with Prober(url, pid) as busy, here:
            with contextlib.suppress(EOFError):
                while True:
                    sent.append(here.recv())
                    print(_line(sent[-1], busy.probes), file=sys.stderr, flush=True)
            attacker.join()
    allowed = memory_sum(settings, capacity, at_rest)
    return {
        "rows": [_row(each, busy.probes) for each in sent],
        "summary": _summary(quiet.probes, busy.probes, sum(allowed.values())),
        "memory": allowed,
    }


def _row(sent: Sent, probes: Probes) -> dict[str, object]:
    """The worst of what was asked while these requests ran."""

    def worst(of: list[Probe]) -> float:
        during = [p.seconds for p in of if p.sent < sent.ended and p.sent + p.seconds > sent.began]
        return 1000 * max(during, default=0.0)

    peak = max((rss for at, rss in probes.rss if sent.began <= at <= sent.ended), default=0)
    return {
        "request": sent.label,
        "ended": " ".join(f"{status}x{num}" for status, num in sent.statuses.items()),
        "s": sent.ended - sent.began,
        "second ms": worst(probes.second),
        "health ms": worst(probes.health),
        "MB": peak // 10**6,
    }


def _line(sent: Sent, probes: Probes) -> str:
    return "  ".join(str(each) for each in _row(sent, probes).values())


def _summary(quiet: Probes, busy: Probes, allowed: int) -> dict[str, Any]:
    before = percentile([each.seconds for each in quiet.second], 99)
    during = percentile([each.seconds for each in busy.second], 99)
    bound = MAX_FACTOR * before + MAX_MORE
    health = max(each.seconds for each in busy.health)
    peak = max(rss for _, rss in busy.rss)
    unserved = Counter(each.status for each in busy.second + busy.health if each.status != 200)
    return {
        "quiet p99 ms": 1000 * before,
        "p99 ms": 1000 * during,
        "bound ms": 1000 * bound,
        "worst ms": 1000 * max(each.seconds for each in busy.second),
        "health ms": 1000 * health,
        "late ms": 1000 * percentile(busy.lateness, 99),
        "asked": len(busy.second),
        "unserved": dict(unserved),
        "peak MB": peak // 10**6,
        "sum MB": allowed // 10**6,
        "within": not unserved and during <= bound and health <= MAX_HEALTH and peak <= allowed,
    }


def main() -> int:
    """Measure, and print the table; 1 where a bound is not kept."""
    options = parser(__doc__)
    options.add_argument("--model", nargs="*", default=[], help="default: the shipped model")
    options.add_argument("--at-once", type=int, default=4, help="equal requests at a time")
    options.add_argument("--max-body-bytes", type=int, default=4 << 20)
    options.add_argument("--flag", action="append", default=[], help="of the server: --flag=--x=1")
    arguments: argparse.Namespace = options.parse_args()
    max_body_bytes = arguments.max_body_bytes
    settings = Settings(
        model=tuple(arguments.model),
        max_body_bytes=max_body_bytes,
        max_received_bytes=4 * max_body_bytes,
    )
    seconds = 0.5 if arguments.quick else 4.0
    found = run_bounds(settings, arguments.flag, arguments.at_once, seconds)
    show("While one key sends these, a second asks for 16 tokens every 100 ms", found["rows"])
    show("The sum of docs/operations.md, MB", [{k: v // 10**6 for k, v in found["memory"].items()}])
    show("The second key, /health and memory", [found["summary"]])
    if arguments.json:
        write_json(arguments.json, {"bounds": found})
    return 0 if found["summary"]["within"] else 1


if __name__ == "__main__":
    sys.exit(main())

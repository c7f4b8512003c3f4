"""Turns a second of one, two and four servers over one PostgreSQL, where computing is no bound.

Each is a real server in a process of its own, whose engine sleeps in every step; all share two
cores with the database and the clients. Each has twice as many clients as slots; they take turns of
their own sessions, each at its server, as a load balancer sends them. Sessions are recipes.
PostgreSQL (fsync on) is started in a temporary folder: `python -m benchmarks.replicas`, for which
Debian's package is needed.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from benchmarks.common import Report, run, show
from tests.engine.making import model_folder
from tests.engine.postgres import PASSWORD, running_postgres

NUM_REPLICAS = (1, 2, 4)
NUM_SLOTS = 4
STEP_SECONDS = 0.05
TOKENS_PER_TURN = 8
NUM_ROUNDS = 3
SECONDS = 8.0
WARM_SECONDS = 1.5


@contextlib.contextmanager
def replica(database: str, password_file: Path) -> Iterator[str]:
    """A server; its URL when it is ready."""
    command = [
        *(sys.executable, "-m", "tests.server.replicas.slow_main", "serve"),
        *(str(model_folder("cottention")), "--port", "0", "--max-slots", str(NUM_SLOTS)),
        *("--session-store", database, "--session-store-password-file", str(password_file)),
    ]
    environment = os.environ | {"STEP_SECONDS": str(STEP_SECONDS), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as popen:
        try:
            assert popen.stdout
            lines = iter(popen.stdout.readline, "")
            yield next(line.split()[-1] for line in lines if line.startswith("ready"))
        finally:
            popen.terminate()


class Client:
    """Takes turns of a session of its own."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=60)
        made = self._client.post("/v1/sessions", json={"prompt": "def f(x):"})
        self._body = {
            "session_id": made.json()["id"],
            "prompt": "x",
            "max_tokens": TOKENS_PER_TURN,
            "ignore_eos": True,
        }

    def turns(self, begins: float, ends: float) -> int:
        """How many were answered in this time; those before it are not counted."""
        num = 0
        while (now := time.perf_counter()) < ends:
            self._client.post("/v1/completions", json=self._body).raise_for_status()
            num += now >= begins
        return num


def rate(clients: list[Client], seconds: float) -> float:
    """Turns a second of all clients together."""
    begins = time.perf_counter() + WARM_SECONDS
    with ThreadPoolExecutor(len(clients)) as pool:
        nums = [*pool.map(lambda each: each.turns(begins, begins + seconds), clients)]
    return sum(nums) / seconds


def measure(quick: bool) -> Report:
    """One table: a row for each number of servers."""
    with (
        running_postgres(is_durable=True) as server,
        tempfile.TemporaryDirectory() as name,
        contextlib.ExitStack() as stack,
    ):
        file = Path(name) / "password"
        file.write_text(PASSWORD)
        urls = [stack.enter_context(replica(server.url, file)) for _ in range(max(NUM_REPLICAS))]
        clients = [[Client(url) for _ in range(2 * NUM_SLOTS)] for url in urls]
        rates: dict[int, list[float]] = {num: [] for num in NUM_REPLICAS}
        for _ in range(1 if quick else NUM_ROUNDS):
            for num, found in rates.items():
                found.append(rate([each for some in clients[:num] for each in some], SECONDS))
    least = NUM_SLOTS / (STEP_SECONDS * TOKENS_PER_TURN)
    rows = [
        {
            "servers": num,
            "turns/s": statistics.median(found),
            "beside one": statistics.median(
                many / one for many, one in zip(found, rates[1], strict=True)
            ),
            "if only sleeping": least * num,
        }
        for num, found in rates.items()
    ]
    show("Replicas: turns of sessions", rows)
    return {"replicas": rows}


if __name__ == "__main__":
    run(__doc__ or "", measure)

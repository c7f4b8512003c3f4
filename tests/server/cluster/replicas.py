"""Real servers over one real PostgreSQL, behind a real HAProxy."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.engine.postgres import PASSWORD, Postgres, running_postgres
from tests.ports import free_port
from tests.server.cluster.haproxy import START, Balancer, running_haproxy
from tests.server.live import PATIENCE, eventually

ROOT = Path(__file__).parents[3]
DRAIN_SECONDS = 200.0
"""Streams of the tests end before, on whatever machine."""


@dataclass
class Replica:
    """`cottention serve` on an address of its own, in a process that can be ended and started."""

    address: str
    port: int
    command: list[str]
    log: Path
    process: "subprocess.Popen[bytes] | None" = field(default=None)

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port}"

    def start(self) -> None:
        """Does not wait until it is ready."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command, "--host", self.address, "--port", str(self.port)],
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> int:
        """Its exit status."""
        assert self.process is not None
        return self.process.wait(START)

    def revive(self) -> None:
        """Let it go on, or replace it where it has ended or ends."""
        assert self.process is not None
        self.send(signal.SIGCONT)
        if self.process.poll() is not None or not self.is_ready():
            self.process.kill()
            self.process.wait()
            self.start()

    def is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        try:
            return httpx.get(f"{self.url}/ready", timeout=PATIENCE).status_code == 200
        except httpx.TransportError:
            return False

    def num_running(self) -> int:
        """Its requests that run."""
        text = httpx.get(f"{self.url}/metrics", timeout=PATIENCE).text
        found = re.search(r"^cottention:num_requests_running\{.*\} (\d+)", text, re.MULTILINE)
        assert found
        return int(found[1])


@dataclass
class Cluster:
    """Its client speaks to HAProxy."""

    postgres: Postgres
    balancer: Balancer
    replicas: list[Replica]
    client: httpx.Client

    def opened(self) -> str:
        """A new session."""
        answer = self.client.post("/v1/sessions", json={"prompt": "def f(x):"})
        assert answer.status_code == 200, answer.text
        session_id: str = answer.json()["id"]
        return session_id

    def turn(self, session_id: str, num_tokens: int = 4, **body: Any) -> httpx.Response:
        """A turn of so many tokens, whose answer may be an error."""
        given = {"prompt": "x", "session_id": session_id, "max_tokens": num_tokens}
        return self.client.post("/v1/completions", json=given | {"ignore_eos": True} | body)

    def position(self, session_id: str) -> int:
        answer = self.client.get(f"/v1/sessions/{session_id}")
        assert answer.status_code == 200, answer.text
        position: int = answer.json()["position"]
        return position

    @contextmanager
    def stream(self, session_id: str, num_tokens: int) -> Iterator[Iterator[str]]:
        """The lines of a turn whose first event has come."""
        body = {"prompt": "x", "session_id": session_id, "stream": True, "ignore_eos": True}
        given = body | {"max_tokens": num_tokens}
        with self.client.stream("POST", "/v1/completions", json=given) as answer:
            lines = answer.iter_lines()
            assert answer.status_code == 200, answer.read()
            assert next(lines).startswith("data: ")
            yield lines

    def runner(self) -> Replica:
        """The replica that has the only running request."""
        eventually(lambda: sum(each.num_running() for each in self.replicas), equals=1)
        [found] = [each for each in self.replicas if each.num_running()]
        return found


@contextmanager
def running_cluster(model: Path, folder: Path, num: int) -> Iterator[Cluster]:
    """So many replicas, all of them ready."""
    password = folder / "password"
    password.write_text(PASSWORD)
    with running_postgres() as postgres:
        flags = {
            "--session-store": postgres.url,
            "--session-store-password-file": str(password),
            "--drain-seconds": f"{DRAIN_SECONDS:g}",
        }
        words = [word for pair in flags.items() for word in pair]
        command = [sys.executable, "-m", "cottention.server", "serve", str(model), *words]
        port = free_port()
        replicas = [
            Replica(f"127.0.2.{n + 1}", port, command, folder / f"log-{n}") for n in range(num)
        ]
        try:
            for replica in replicas:
                replica.start()
            for replica in replicas:
                eventually(replica.is_ready, seconds=START)
            with (
                running_haproxy([each.address for each in replicas], port) as balancer,
                httpx.Client(base_url=balancer.url, timeout=PATIENCE) as client,
            ):
                balancer.wait_for(num)
                yield Cluster(postgres, balancer, replicas, client)
        finally:
            for replica in replicas:
                if replica.process is not None and replica.process.poll() is None:
                    os.kill(replica.process.pid, signal.SIGKILL)
                    replica.process.wait()

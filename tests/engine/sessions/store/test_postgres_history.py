"""What replicas have answered is what the sessions hold, whatever dies, stops or is cut meanwhile.

Three replicas in processes of their own take turns of the same sessions through a proxy, while they
are killed, stopped past their leases and woken, while the database is restarted at once, and while
commits are cut before and after they arrive. COTTENTION_HISTORY_SECONDS is how long.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest

from cottention.engine.errors import SnapshotError
from cottention.engine.sessions.store import NewSession
from cottention.engine.sessions.store.postgres.store import PostgresStore
from tests.engine.postgres import PASSWORD, Postgres, running_postgres
from tests.engine.tcp_proxy import TcpProxy, proxied

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[4]
SECONDS = float(os.environ.get("COTTENTION_HISTORY_SECONDS", "25"))
STOPPED_SECONDS = 3.0
"""Longer than a replica lives without heartbeats."""


class Replica:
    """A process that is started again after it was killed; what all of them have said."""

    def __init__(self, url: str, number: int, mode: str, session_ids: list[str]) -> None:
        self._arguments = url, mode, session_ids
        self._number = number
        self._starts = count()
        self._readers: list[threading.Thread] = []
        self.lines: list[list[str]] = []
        self.start()

    def start(self) -> None:
        url, mode, session_ids = self._arguments
        name = f"{self._number}.{next(self._starts)}"
        command = [sys.executable, "-m", "tests.engine.history_process", url, name, mode]
        environment = {**os.environ, "PGPASSWORD": PASSWORD}
        self.popen = subprocess.Popen(
            [*command, *session_ids], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        self._readers.append(threading.Thread(target=self._read, args=[self.popen]))
        self._readers[-1].start()

    def _read(self, popen: "subprocess.Popen[str]") -> None:
        assert popen.stdout
        with popen.stdout:
            for line in popen.stdout:
                if line.endswith("\n"):
                    self.lines.append(line.split())

    def kill(self) -> None:
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait()
        for reader in self._readers:
            reader.join()

    def said(self, word: str) -> list[list[str]]:
        return [rest for first, *rest in self.lines if first == word]


@contextmanager
def replicas(url: str, mode: str, session_ids: list[str]) -> Iterator[list[Replica]]:
    running = [Replica(url, n, mode, session_ids) for n in range(3)]
    try:
        yield running
    finally:
        for each in running:
            each.popen.send_signal(signal.SIGCONT)
            each.kill()


def kill(replica: Replica) -> None:
    replica.kill()
    replica.start()


def stop(replica: Replica) -> None:
    replica.popen.send_signal(signal.SIGSTOP)
    time.sleep(STOPPED_SECONDS)
    replica.popen.send_signal(signal.SIGCONT)


def harm(rng: random.Random, running: list[Replica], server: Postgres, proxy: TcpProxy) -> None:
    """One thing that goes wrong, and what follows from it."""
    replica = rng.choice(running)

    def cut() -> None:
        for _ in range(10):
            proxy.arm(
                b"cottention.commit_v1", rng.choice(["lose request", "lose answer", "swallow"])
            )
            time.sleep(0.05)

    def restart() -> None:
        server.stop(signal.SIGQUIT)
        server.start()

    harms: list[Callable[[], None]] = [lambda: kill(replica), lambda: stop(replica), restart]
    rng.choice([*harms, cut, cut, cut])()
    time.sleep(rng.uniform(0, 0.5))


def lost_double_wrong(store: PostgresStore, running: list[Replica]) -> tuple[int, int, int]:
    """Answered turns that are missing or are elsewhere than was said; turns that are there twice;
    turns that were refused and are there.
    """
    lost = double = wrong = 0
    done = [line for each in running for line in each.said("done")]
    refused = [line for each in running for line in each.said("refused")]
    held = {
        session_id: store.get(store.record(session_id).head).decode().split()
        for session_id in {line[0] for line in done}
    }
    for session_id, name, position in done:
        names = held[session_id]
        lost += int(position) > len(names) or names[int(position) - 1] != name
    for names in held.values():
        double += sum(num - 1 for num in Counter(names).values())
    for session_id, name in refused:
        wrong += name in held.get(session_id, [])
    return lost, double, wrong


@pytest.mark.timeout(SECONDS + 300)
def test_no_turn_is_lost_double_or_wrong() -> None:
    rng = random.Random(1)
    with (
        running_postgres(is_durable=True) as server,
        proxied(server.port) as proxy,
        closing(PostgresStore(server.url, password=PASSWORD)) as store,
    ):
        made = store.create([NewSession("a", 1, b"first") for _ in range(6)])
        url = server.url.replace(str(server.port), str(proxy.port))
        with replicas(url, "fenced", [each.id for each in made]) as running:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end or not all(each.said("done") for each in running):
                harm(rng, running, server, proxy)
        num_done = sum(len(each.said("done")) for each in running)
        found = lost_double_wrong(store, running)
    print(f"{num_done} turns answered, {proxy.num_faults} commits cut, {found=}")
    assert num_done > 20
    assert proxy.num_faults > 0
    assert found == (0, 0, 0)


@pytest.mark.timeout(SECONDS + 300)
def test_the_history_shows_late_writes_where_they_are_not_refused() -> None:
    """Or the other test would prove nothing."""
    with (
        running_postgres() as server,
        closing(PostgresStore(server.url, password=PASSWORD)) as store,
    ):
        [made] = store.create([NewSession("a", 1, b"first")])
        with replicas(server.url, "naive", [made.id]) as running:
            while True:
                stop(random.choice(running))
                with suppress(SnapshotError):  # the head that was read has been replaced
                    if sum(lost_double_wrong(store, running)):
                        break

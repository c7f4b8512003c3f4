"""Servers in processes of their own over one PostgreSQL, and clients that come back."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psycopg

from cottention.engine.engine import Engine
from cottention.engine.sampling_params import SamplingParams
from tests.engine.making import model_folder
from tests.engine.postgres import PASSWORD, Postgres
from tests.ports import free_port
from tests.server.live import PATIENCE

# Without verify=False each call would read the certificates of all authorities, for plain HTTP.
send = partial(httpx.request, timeout=PATIENCE, verify=False, trust_env=False)
stream = partial(httpx.stream, timeout=PATIENCE, verify=False, trust_env=False)

ROOT = Path(__file__).parents[3]
TRIES = 400
"""Of a client, each after RETRY_SECONDS: longer than any server takes to start."""
RETRY_SECONDS = 0.1
LIFE_SECONDS = 2.0
"""Of a server after its last beat, unless a test gives it more: its turns are adopted then."""


@dataclass
class ReplicaProcess:
    """A server that can be killed, stopped and started again at the same port."""

    flags: list[str]
    log: Path
    port: int = field(default_factory=free_port)
    step_seconds: float = 0.01
    life_seconds: float = LIFE_SECONDS
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begin to start it; `wait` waits."""
        command = [sys.executable, "-m", "tests.server.replicas.slow_main", "serve"]
        command += [str(model_folder("cottention")), "--port", str(self.port), *self.flags]
        seconds = {"STEP_SECONDS": self.step_seconds, "LIFE_SECONDS": self.life_seconds}
        environment = os.environ | {name: str(value) for name, value in seconds.items()}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log
            )

    def wait(self) -> None:
        """Return when it answers."""
        deadline = time.monotonic() + 3 * PATIENCE
        while True:
            with contextlib.suppress(httpx.TransportError):
                if send("GET", f"{self.url}/health").status_code == 200:
                    return
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9."""
        self.send(signal.SIGKILL)
        self.ended()

    def ended(self) -> int:
        """Wait until it has ended."""
        assert self.process is not None
        return self.process.wait(2 * PATIENCE)


@dataclass
class Cluster:
    postgres: Postgres
    replicas: list[ReplicaProcess]

    def url(self) -> str:
        """Of any of them, dead or alive."""
        return random.choice(self.replicas).url

    def opened(self, prompt: list[int]) -> str:
        """A new session."""
        answer = request("POST", self, "/v1/sessions", json={"prompt": prompt})
        session_id: str = answer.json()["id"]
        return session_id

    def session(self, session_id: str) -> Any:
        return request("GET", self, f"/v1/sessions/{session_id}").json()

    def seconds_of_reading(self, session_id: str) -> float:
        """The longest that a server took to read what a turn that it adopted had generated."""
        told = re.compile(rf"session {session_id}: adopted turn read in ([\d.]+) s")
        logs = [each.log.read_text() for each in self.replicas]
        return max((float(each) for log in logs for each in told.findall(log)), default=0.0)

    def rows(self, statement: str) -> list[Any]:
        with psycopg.connect(self.postgres.url, password=PASSWORD, autocommit=True) as db:
            return db.execute(statement.encode()).fetchall()


@contextlib.contextmanager
def cluster(
    postgres: Postgres,
    folder: Path,
    *flags: str,
    num: int = 3,
    step_seconds: float = 0.01,
    life_seconds: float = LIFE_SECONDS,
) -> Iterator[Cluster]:
    """An empty database and servers over it, killed at the end."""
    with psycopg.connect(postgres.url, password=PASSWORD) as db:
        db.execute("DROP SCHEMA IF EXISTS cottention CASCADE")
    password = folder / "password"
    password.write_text(PASSWORD)
    store = ["--session-store", postgres.url, "--session-store-password-file", str(password)]
    replicas = [
        ReplicaProcess(
            [*store, *flags],
            folder / f"log{n}",
            step_seconds=step_seconds,
            life_seconds=life_seconds,
        )
        for n in range(num)
    ]
    try:
        for each in replicas:
            each.start()
        for each in replicas:
            each.wait()
        yield Cluster(postgres, replicas)
    finally:
        for each in replicas:
            if each.process is not None and each.process.poll() is None:
                each.send(signal.SIGCONT)
                each.kill()


def request(method: str, among: Cluster, path: str, **more: Any) -> httpx.Response:
    """A request to any server, again where it is dead or says 503; other errors fail."""
    for _ in range(TRIES):
        with contextlib.suppress(httpx.TransportError):
            answer = send(method, among.url() + path, **more)
            if answer.status_code == 200:
                return answer
            assert answer.status_code == 503, answer.text
            assert int(answer.headers["retry-after"]) > 0
        time.sleep(RETRY_SECONDS)
    raise AssertionError(f"{method} {path} has no answer")


@dataclass
class Follower(threading.Thread):
    """A client of a turn that goes on: it asks any server for more after each break.

    ids, data: of the events, as they came. longest_gap: seconds between two events where a
    connection broke between them. longest_pause: where none did.
    """

    among: Cluster
    session_id: str
    body: dict[str, Any]
    key: str

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self.ids: list[str] = []
        self.data: list[str] = []
        self.longest_gap = 0.0
        self.longest_pause = 0.0
        self.num_breaks = 0
        self.error: BaseException | None = None
        self._last = 0.0
        self._is_whole = True

    def __hash__(self) -> int:
        return id(self)

    @property
    def text(self) -> str:
        return "".join(
            choice["text"]
            for data in self.data
            if data != "[DONE]"
            for choice in json.loads(data).get("choices", ())
        )

    def run(self) -> None:
        try:
            for _ in range(TRIES):
                with contextlib.suppress(httpx.TransportError):
                    self._follow()
                if self.data and self.data[-1] == "[DONE]":
                    return
                self._is_whole = False
                self.num_breaks += 1
                time.sleep(RETRY_SECONDS)
            raise AssertionError(f"the turn has not ended after {self.ids[-1:]}")
        except BaseException as error:
            self.error = error

    def _follow(self) -> None:
        url = self.among.url()
        if self.ids:
            path = f"/v1/sessions/{self.session_id}/events"
            asked: dict[str, Any] = {"headers": {"Last-Event-ID": self.ids[-1]}}
            opened = stream("GET", url + path, **asked)
        else:
            body = self.body | {"session_id": self.session_id, "stream": True}
            headers = {"Idempotency-Key": self.key}
            opened = stream("POST", f"{url}/v1/completions", json=body, headers=headers)
        with opened as response:
            if response.status_code != 200:
                response.read()
                assert response.status_code == 503, response.text
                assert int(response.headers["retry-after"]) > 0
                return
            unread = ""
            for piece in response.iter_text():
                *blocks, unread = (unread + piece).split("\n\n")
                for block in blocks:
                    self._take(block)

    def _take(self, block: str) -> None:
        if block.startswith(":"):
            return
        now = time.monotonic()
        if self._last and self._is_whole:
            self.longest_pause = max(self.longest_pause, now - self._last)
        elif self._last:
            self.longest_gap = max(self.longest_gap, now - self._last)
        self._last, self._is_whole = now, True
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        self.ids.append(fields["id"])
        self.data.append(fields["data"])
        assert "error" not in fields["data"], fields["data"]

    def check(self, twin: str, *, is_cut: bool = False) -> None:
        """Each event once and in order, and the text of a turn that nothing disturbed.

        is_cut: it was cancelled, where a character may have begun.
        """
        self.join(4 * PATIENCE)
        assert not self.is_alive(), f"it still runs after {self.ids[-1:]}"
        if self.error is not None:
            raise self.error
        [turn] = {each.split("-")[0] for each in self.ids}
        assert self.ids == [f"{turn}-{n}" for n in range(len(self.ids))]
        unfinished = "\ufffd" if is_cut else ""
        assert self.text.rstrip(unfinished) == twin.rstrip(unfinished)


class Sleeper(threading.Thread):
    """Sleeps again and again. latest: seconds that it was woken too late, the most of them.

    A machine that stops everybody for a while lets leases lapse, and then all streams are cut.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.latest = 0.0
        self._stopping = threading.Event()

    def __enter__(self) -> "Sleeper":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self.join()

    def run(self) -> None:
        before = time.monotonic()
        while not self._stopping.wait(0.01):
            now = time.monotonic()
            self.latest = max(self.latest, now - before - 0.01)
            before = now


def twin_of(engine: Engine, prompts: list[list[int]], body: dict[str, Any]) -> str:
    """What a turn says that nothing disturbs: after the session's prompt, the turn's."""
    first, second = prompts
    start = engine.policies.new_session(None)
    engine.submit(first, SamplingParams(max_tokens=0), start=start)
    [state] = [out.state for _ in iter(engine.has_work, False) for out in engine.step()]
    params = {name: value for name, value in body.items() if name != "prompt"}
    params["stop"] = tuple(params["stop"])
    engine.submit(second, SamplingParams(**params), start=state)
    outputs = [out for _ in iter(engine.has_work, False) for out in engine.step()]
    return "".join(out.text for out in outputs)

"""`serve run` and its replicas, as tests see them."""

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.engine.postgres import Postgres

NUM_REPLICAS = 3

PATIENCE = 900.0
"""Seconds after which something hangs, on a machine that does other things as well."""


def eventually(condition: Callable[[], bool]) -> None:
    """Return when it holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE:.0f} s"
        time.sleep(0.2)


@dataclass
class Served:
    """`serve run`, and a client of its proxy."""

    process: "subprocess.Popen[bytes]"
    postgres: Postgres
    client: httpx.Client
    log: Path

    def post(self, path: str, header: str | None = None, **body: Any) -> Any:
        """What is answered. header: the session's id in the header that routes."""
        headers = {} if header is None else {"X-Session-Id": header}
        answer = self.client.post(path, json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def replicas(self) -> list[int]:
        """The processes of replicas below `serve run`."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                name = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if b"ServeReplica" in name and self.process.pid in _ancestors(int(folder.name)):
                found.append(int(folder.name))
        return found


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return
        yield pid

"""Three replicas that Ray Serve runs over a PostgreSQL; without Ray nothing is collected."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engine.postgres import PASSWORD, Postgres, free_port, running_postgres
from tests.ray.patience import eventually

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "data" / "golden" / "cottention-gptj"
NUM_REPLICAS = 3

if importlib.util.find_spec("ray") is None:
    collect_ignore_glob = ["test_*.py"]


@dataclass
class Served:
    """`serve run`, and a client of its proxy."""

    process: "subprocess.Popen[bytes]"
    postgres: Postgres
    client: httpx.Client
    log: Path

    def post(self, path: str, session_id: str | None = None, **body: Any) -> Any:
        """What is answered. session_id: of the header that routes."""
        headers = {} if session_id is None else {"X-Session-Id": session_id}
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


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    port = free_port()
    # Ray's sockets are in the folder, and a socket's path is short.
    with running_postgres() as postgres, tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        (folder / "password").write_text(PASSWORD)
        application = {
            "name": "cottention",
            "import_path": "cottention.server.cluster.ray:app",
            "route_prefix": "/",
            "args": {
                "replicas": NUM_REPLICAS,
                "cpus": 0.1,
                "model": str(MODEL),
                "session_store": postgres.url,
                "session_store_password_file": str(folder / "password"),
                "ui": False,
            },
        }
        config = {
            "http_options": {"host": "127.0.0.1", "port": port},
            "applications": [application],
        }
        (folder / "serve.yaml").write_text(json.dumps(config))
        environment = os.environ | {
            "RAY_TMPDIR": name,
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "namespace"), *sys.path]),
        }
        command = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run"]
        log = folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, str(folder / "serve.yaml")],
                env=environment,
                cwd=ROOT,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
                made = Served(process, postgres, client, log)
                eventually(lambda: _is_ready(made))
                eventually(lambda: len(made.replicas()) == NUM_REPLICAS)
                yield made
        except BaseException:
            print(log.read_text()[-8000:])
            raise
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def _is_ready(served: Served) -> bool:
    assert served.process.poll() is None, served.log.read_text()[-8000:]
    try:
        return served.client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False

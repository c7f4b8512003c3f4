"""Three replicas that Ray Serve runs over a PostgreSQL; without Ray nothing is collected."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.engine.postgres import PASSWORD, running_postgres
from tests.ports import free_port
from tests.ray.served import NUM_REPLICAS, PATIENCE, Served, eventually

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "data" / "golden" / "cottention-gptj"

if importlib.util.find_spec("ray") is None:
    collect_ignore_glob = ["test_*.py"]


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
        # It gives up in seconds what takes minutes on a machine that does other things as well.
        environment = os.environ | {
            "RAY_TMPDIR": name,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",  # or it would write a token into the user's home
            "RAY_raylet_start_wait_time_s": f"{PATIENCE:.0f}",
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": f"{PATIENCE:.0f}",
            "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": f"{PATIENCE:.0f}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "namespace"), *sys.path]),
        }
        command = [sys.executable, "-m", "tests.ray.run", f"{PATIENCE:.0f}"]
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

"""cluster.yaml, started as its first lines say: three servers, a database, HAProxy, Prometheus."""

import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.containers.compose import ROOT, run

FILE = ROOT / "docker" / "cluster.yaml"
IMAGES = Path(__file__).parent / "images"
URL = "http://127.0.0.1:8000"
NUM_REPLICAS = 3
PATIENCE = 280
"""Seconds after which something hangs, on a machine that does other things as well."""

pytestmark = pytest.mark.timeout(900)


def cluster(*arguments: str) -> str:
    """`docker compose ARGUMENTS`."""
    return run("docker", "compose", "--file", str(FILE), *arguments, CHECK_TIMEOUT="15s")


def wait_for(read: Any, expected: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while (value := read()) != expected:
        assert time.monotonic() < deadline, f"{value!r}\n{cluster('logs', '--tail', '40')}"
        time.sleep(0.2)


def states(backend: str) -> dict[str, int]:
    """How many servers of HAProxy are UP, DOWN, NOLB; none while it starts."""
    url = "http://127.0.0.1:8404/metrics"
    code = f"import urllib.request; print(urllib.request.urlopen({url!r}).read().decode())"
    try:
        text = cluster("exec", "-T", "haproxy", "python3", "-c", code)
    except AssertionError:
        return {}
    pattern = rf'haproxy_server_status{{proxy="{backend}",server="[^"]+",state="(\w+)"}} 1'
    found = re.findall(pattern, text)
    return {state: found.count(state) for state in {*found} - {"MAINT"}}


def targets() -> dict[str, int]:
    """How many of each job Prometheus reads, and found up."""
    try:
        told = httpx.get("http://127.0.0.1:9090/api/v1/targets", timeout=20).json()
    except httpx.TransportError:
        return {}
    jobs = [
        each["labels"]["job"] for each in told["data"]["activeTargets"] if each["health"] == "up"
    ]
    return {job: jobs.count(job) for job in jobs}


def turn(session_id: str) -> httpx.Response:
    body = {"session_id": session_id, "prompt": "x = 1\n", "max_tokens": 6, "ignore_eos": True}
    return httpx.post(f"{URL}/v1/completions", json=body, timeout=60)


def position(session_id: str) -> int:
    answer = httpx.get(f"{URL}/v1/sessions/{session_id}", timeout=60)
    assert answer.status_code == 200, answer.text
    at: int = answer.json()["position"]
    return at


@pytest.fixture(scope="module")
def running(image: str) -> Iterator[None]:
    assert image
    names = {
        "haproxy": "haproxy:2.6-bookworm",
        "postgres": "postgres:15-bookworm",
        "prometheus": "prom/prometheus:v2.53.3",
    }
    told = FILE.read_text()
    for target, name in names.items():
        assert f"image: {name}\n" in told
        run("docker", "build", "--quiet", "--target", target, "--tag", name, str(IMAGES))
    try:
        cluster("up", "--detach", "--no-build", "--scale", f"replica={NUM_REPLICAS}")
        wait_for(lambda: states("sessions"), {"UP": NUM_REPLICAS})
        yield
    finally:
        print(cluster("logs", "--no-color", "--tail", "60"))
        cluster("down", "--volumes", "--timeout", "20")


@pytest.mark.usefixtures("running")
def test_every_replica_is_found_by_haproxy_and_by_prometheus() -> None:
    """By their one name: nobody lists them."""
    for backend in ("sessions", "grouped", "anywhere"):
        wait_for(lambda name=backend: states(name), {"UP": NUM_REPLICAS})
    wait_for(targets, {"cottention": NUM_REPLICAS, "haproxy": 1})


@pytest.mark.usefixtures("running")
def test_everything_is_closed_and_nothing_runs_as_root() -> None:
    """The password least of all: no environment, no command has it."""
    containers = cluster("ps", "--all", "--quiet").split()
    assert len(containers) == NUM_REPLICAS + 4
    for container in containers:
        [known] = json.loads(run("docker", "inspect", container))
        assert known["Config"]["User"] not in ("", "0", "root"), known["Name"]
        assert known["HostConfig"]["ReadonlyRootfs"], known["Name"]
        assert known["HostConfig"]["CapDrop"] == ["ALL"], known["Name"]
        assert not re.search(r"\b[0-9a-f]{48}\b", json.dumps(known["Config"]["Env"]))
    password = cluster("exec", "-T", "postgres", "cat", "/run/database/password")
    assert re.fullmatch(r"[0-9a-f]{48}", password)
    assert password not in cluster("logs", "--no-color")


@pytest.mark.usefixtures("running")
def test_replicas_are_restarted_and_killed_under_load_and_no_turn_is_lost() -> None:
    """A turn that was answered is there; one that was cut is there whole or not at all."""
    sessions = [
        httpx.post(f"{URL}/v1/sessions", json={}, timeout=60).json()["id"] for _ in range(4)
    ]
    assert turn(sessions[0]).status_code == 200
    length = position(sessions[0])
    answered, uncertain = [1, 0, 0, 0], [0] * 4
    stopping = threading.Event()
    wrong: list[object] = []

    def talk(index: int) -> None:
        while not stopping.is_set():
            answer = turn(sessions[index])
            if answer.status_code == 200:
                answered[index] += 1
            elif answer.status_code in (502, 409):
                uncertain[index] += answer.status_code == 502
                time.sleep(0.5)
            elif answer.status_code == 503 and int(answer.headers["retry-after"]) > 0:
                time.sleep(0.5)
            else:
                wrong.append((answer.status_code, answer.text))

    threads = [threading.Thread(target=talk, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    replicas = cluster("ps", "--quiet", "replica").split()
    run("docker", "restart", replicas[0])
    wait_for(lambda: states("sessions"), {"UP": NUM_REPLICAS})
    assert uncertain == [0] * 4, "a restart cut requests"
    run("docker", "kill", "--signal", "KILL", replicas[1])
    time.sleep(3)
    run("docker", "start", replicas[1])
    wait_for(lambda: states("sessions"), {"UP": NUM_REPLICAS})
    stopping.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    print(f"{sum(answered)} turns answered, {sum(uncertain)} cut by the kill")
    for session_id, sure, maybe in zip(sessions, answered, uncertain, strict=True):
        at = position(session_id)
        assert at % length == 0
        assert sure <= at // length <= sure + maybe


@pytest.mark.usefixtures("running")
def test_sessions_come_back_from_a_backup(tmp_path: Path) -> None:
    """As docs/cluster/runbook.md says: dump; empty, restore, start."""
    kept = httpx.post(f"{URL}/v1/sessions", json={"prompt": "import os"}, timeout=60).json()["id"]
    before = position(kept)
    page = (ROOT / "docs" / "cluster" / "runbook.md").read_text()
    [script] = re.findall(r"```sh\n(docker compose [^`]*pg_dump[^`]*)```", page)
    script = script.replace("docker compose", "docker compose -f docker/cluster.yaml")
    script = script.replace("cottention.dump", str(tmp_path / "cottention.dump"))
    subprocess.run(["bash", "-euxc", script], cwd=ROOT, check=True, timeout=200)
    wait_for(lambda: states("sessions"), {"UP": NUM_REPLICAS})
    assert position(kept) == before
    assert turn(kept).status_code == 200

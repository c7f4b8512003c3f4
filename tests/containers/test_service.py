"""The compose file's service: up and healthy, who it runs as, what it answers, what it keeps."""

import re
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.containers.compose import (
    ROOT,
    URL,
    compose,
    figure,
    inside,
    inspected,
    is_ready,
    opened,
    position,
    post,
    stream,
    turn,
    up,
    wait_for,
)
from tests.docs.pages import blocks, matches

pytestmark = pytest.mark.usefixtures("service")

MAX_IDLE_BYTES = 600e6


def test_it_is_healthy_and_small(seconds_to_healthy: float) -> None:
    """First of all, while nothing has been asked of it."""
    resident = figure("process_resident_memory_bytes")
    print(f"healthy after {seconds_to_healthy:.1f} s, {resident / 1e6:.0f} MB resident")
    assert resident <= MAX_IDLE_BYTES


def test_it_says_what_it_is_and_warns_of_nothing() -> None:
    logs = compose("logs", "--no-color", "--no-log-prefix", "server")
    assert "ready    http://0.0.0.0:8000" in logs
    assert "sessions kept in /sessions" in logs
    assert "warning" not in logs


def test_the_readme_s_request() -> None:
    """Run as it stands there, with the answer that stands there."""
    first = next(block for block in blocks(ROOT / "README.md") if block.answer)
    command = ["bash", "-c", first.text]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert first.answer
    assert matches(first.answer, told.stdout), told.stdout


def test_it_streams() -> None:
    lines = list(stream(max_tokens=500))
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 5


def test_it_runs_as_nobody_with_nothing_to_write_on() -> None:
    code = (
        "import os, pathlib\n"
        "for path in ('/', '/opt/cottention', '/etc', '/tmp', '/sessions'):\n"
        "    try: pathlib.Path(path, 'x').write_text('x'); print(path, 'written')\n"
        "    except OSError as error: print(path, error.errno)\n"
        "print(os.getuid(), os.getgid())\n"
    )
    told = inside("python", "-c", code).split("\n")
    assert told[:5] == [
        "/ 30",
        "/opt/cottention 30",
        "/etc 30",
        "/tmp written",
        "/sessions written",
    ]
    assert told[5] == "10001 10001"
    inside("rm", "/sessions/x", "/tmp/x")
    status = inside("cat", "/proc/1/status")
    assert re.search(r"CapEff:\s+0{16}\n", status)
    assert re.search(r"NoNewPrivs:\s+1\n", status)


def test_it_has_limits() -> None:
    host = inspected("HostConfig")
    assert host["Memory"] == 5 * 1024**3
    assert host["PidsLimit"] == 512
    assert host["ReadonlyRootfs"]
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    assert [port["HostIp"] for port in host["PortBindings"]["8000/tcp"]] == ["127.0.0.1"]


def test_a_session_survives_down_and_up() -> None:
    """It goes on as its twin, which was never interrupted."""
    ours, twin = opened(), opened()
    for session_id in (ours, twin):
        turn(session_id, "def read(path):\n")
    expected = turn(twin, "    return ")
    compose("down")
    up()
    assert turn(ours, "    return ") == expected
    assert position(ours) == position(twin)


def test_sigterm_lets_what_runs_finish() -> None:
    lines = stream(max_tokens=3000)
    first = next(lines)
    stopping = threading.Thread(target=compose, args=("stop", "server"))
    stopping.start()
    wait_for(lambda: not is_ready())
    assert httpx.post(f"{URL}/v1/completions", json={"prompt": "x"}).status_code == 503
    rest = list(lines)
    stopping.join()
    assert first.startswith("data: {")
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2] + rest[-3]
    state = inspected("State")
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False)


def test_keys_come_of_a_secret_file(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\na-key-of-the-tests\n")
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    up(API_KEYS=str(keys))
    assert httpx.get(f"{URL}/v1/models").status_code == 401
    headers = {"Authorization": "Bearer a-key-of-the-tests"}
    assert httpx.get(f"{URL}/v1/models", headers=headers).status_code == 200


def test_sessions_come_back_from_a_backup(tmp_path: Path) -> None:
    """As docs/operations.md says: stop, copy; empty, copy back, start."""
    kept = opened()
    turn(kept, "import os\n")
    before = position(kept)
    run = ("run", "--rm", "--no-deps", "-T", "--entrypoint")
    compose("stop", "server")
    page = (ROOT / "docs" / "operations.md").read_text()
    save, restore = re.findall(r"^docker compose .*tar .*$", page, re.MULTILINE)
    assert run[0] in save
    for command in (save, restore):
        script = command.replace("docker compose", "docker compose -f docker/compose.yaml")
        script = script.replace("sessions.tar", str(tmp_path / "sessions.tar"))
        subprocess.run(["bash", "-ec", script], cwd=ROOT, check=True, timeout=60)
        if command == save:
            compose("down", "--volumes")
    up()
    assert position(kept) == before


def test_what_was_answered_survives_a_kill_under_load() -> None:
    """Every turn of each session adds the same number of ids: none that was answered is missing."""
    num_sessions, num_tokens = 8, 6
    sessions = [opened() for _ in range(num_sessions)]
    prompt = "x = 1\n"
    length = len(post("/tokenize", prompt=prompt)["tokens"]) + num_tokens
    answered = [0] * num_sessions

    def load(index: int) -> None:
        try:
            while True:
                turn(sessions[index], prompt, num_tokens)
                answered[index] += 1
        except httpx.TransportError:
            pass

    threads = [threading.Thread(target=load, args=(index,)) for index in range(num_sessions)]
    for thread in threads:
        thread.start()
    wait_for(lambda: min(answered) > 0)
    time.sleep(2)
    compose("kill", "--signal", "KILL", "server")
    for thread in threads:
        thread.join()
    assert min(answered) > 0
    up()
    for session_id, turns in zip(sessions, answered, strict=True):
        assert position(session_id) in (turns * length, (turns + 1) * length)
        turn(session_id, prompt, num_tokens)
    print(f"{sum(answered)} turns were answered before the kill, and all are there")

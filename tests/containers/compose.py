"""The compose file's server, driven as an operator drives it. Knows no test."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker" / "compose.yaml"
URL = "http://127.0.0.1:8000"
TORCH_INDEX = "file:///opt/torch-index"
"""Where the base image of these tests has torch."""


def run(*command: str, **variables: str) -> str:
    """What a command prints; its failure is one with all that it said."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"TORCH_INDEX": TORCH_INDEX} | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}{done.stderr[-6000:]}"
    return done.stdout


def compose(*arguments: str, **variables: str) -> str:
    """`docker compose ARGUMENTS`, with variables as a file `.env` has them."""
    return run("docker", "compose", "--file", str(FILE), *arguments, **variables)


def inside(*command: str) -> str:
    """What a command prints in the running container."""
    return compose("exec", "-T", "server", *command)


def inspected(what: str) -> Any:
    """A part of what the engine knows of the container."""
    container = compose("ps", "--all", "--quiet", "server").strip()
    return json.loads(run("docker", "inspect", "--format", f"{{{{json .{what}}}}}", container))


def up(**variables: str) -> None:
    """Start the server, or see that it runs with these settings; return when it takes work."""
    compose("up", "--detach", "--no-build", "server", **variables)
    wait_for(is_ready)


def wait_for(condition: Callable[[], bool]) -> None:
    """Return when it holds; a server that ended meanwhile fails at once."""
    deadline = time.monotonic() + 90
    while not condition():
        assert inspected("State.Running"), compose("logs", "server")
        assert time.monotonic() < deadline, compose("logs", "server")
        time.sleep(0.1)


def is_ready() -> bool:
    """Whether it takes new work."""
    try:
        return httpx.get(f"{URL}/ready", timeout=20).status_code == 200
    except httpx.TransportError:
        return False


def is_healthy() -> bool:
    """What the engine's own health check found."""
    status: str = inspected("State.Health.Status")
    return status == "healthy"


def post(path: str, **body: Any) -> Any:
    """The answer to a request that must be taken."""
    answer = httpx.post(f"{URL}{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def turn(session_id: str, prompt: str, max_tokens: int = 8) -> str:
    """The text of a session's next turn, of exactly so many tokens."""
    body = {"session_id": session_id, "prompt": prompt, "max_tokens": max_tokens}
    answer = post("/v1/completions", **body, ignore_eos=True, seed=7)
    text: str = answer["choices"][0]["text"]
    return text


def opened() -> str:
    """A new session."""
    session_id: str = post("/v1/sessions")["id"]
    return session_id


def position(session_id: str) -> int:
    """How many ids a session holds."""
    answer = httpx.get(f"{URL}/v1/sessions/{session_id}", timeout=20)
    assert answer.status_code == 200, answer.text
    place: int = answer.json()["position"]
    return place


def figure(name: str) -> float:
    """One of the server's metrics."""
    lines = httpx.get(f"{URL}/metrics", timeout=20).text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(name)))


def stream(max_tokens: int) -> Iterator[str]:
    """The lines of a streamed completion, as they come."""
    body = {"prompt": "def f(", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{URL}/v1/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200
        yield from (line for line in answer.iter_lines() if line)

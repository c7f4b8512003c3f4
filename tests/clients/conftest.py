"""A real server process with a small model, for clients that other people wrote.

The server runs in the project's own environment, the clients in theirs; where those are not
installed (`make test`), there is nothing to collect.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "data" / "golden" / "cottention-gptj"
KEY = "a key of the tests"

SERVER_PYTHON = os.environ.get("COTTENTION_TEST_PYTHON", str(ROOT / ".venv" / "bin" / "python"))

# No client may go anywhere else, or count its users; some look when they are imported.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_API_KEY": "not this one",
}

if importlib.util.find_spec("schemathesis") is None:
    collect_ignore_glob = ["test_*.py"]


class Served(NamedTuple):
    """Where the server is, and what it serves."""

    url: str
    key: str
    model: str

    @property
    def base_url(self) -> str:
        """What clients of OpenAI call so."""
        return f"{self.url}/v1"


@contextlib.contextmanager
def server_process(
    *flags: str, model: Path = MODEL
) -> Iterator[tuple[subprocess.Popen[str], Served]]:
    """A server process, and where it is; it is ended with the block."""
    settings = ["--port", "0", "--max-slots", "32", "--chat-template", "plain", "--api-key", KEY]
    command = [SERVER_PYTHON, "-m", "cottention.server", "serve", str(model), *settings, *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as popen:
        try:
            assert popen.stdout
            lines = iter(popen.stdout.readline, "")
            url = next((line.split()[-1] for line in lines if line.startswith("ready")), None)
            assert url, "the server did not start"
            yield popen, Served(url, KEY, model.name)
        finally:
            popen.terminate()
            popen.wait(40)


@contextlib.contextmanager
def serving(*flags: str, model: Path = MODEL) -> Iterator[Served]:
    """A server process; it may not die before its time."""
    with server_process(*flags, model=model) as (popen, served):
        yield served
        assert popen.poll() is None, "the server died"
    assert popen.returncode == 0


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """One server for all clients."""
    with serving() as served:
        yield served


def python() -> str:
    """The clients' own interpreter."""
    return sys.executable

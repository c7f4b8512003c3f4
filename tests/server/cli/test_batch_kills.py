"""A batch that is killed again and again: every line is answered, once, and with its own answer.

COTTENTION_BATCH_LINES and COTTENTION_BATCH_KILLS say how many; CI takes some.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.server.live import PATIENCE
from tests.server.process import ROOT, served

pytestmark = pytest.mark.slow

NUM_LINES = int(os.environ.get("COTTENTION_BATCH_LINES", "300"))
NUM_KILLS = int(os.environ.get("COTTENTION_BATCH_KILLS", "3"))
ENGINE_FLAGS = ("--max-slots", "16")


def prompt(number: int) -> str:
    return f"x{number} = "


def write_input(path: Path) -> None:
    with path.open("w") as file:
        for number in range(NUM_LINES):
            body = {"prompt": prompt(number), "max_tokens": 4, "echo": True}
            line = {"custom_id": f"line {number}", "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps(line | {"body": body}) + "\n")


@contextlib.contextmanager
def target(where: str, model: Path) -> Iterator[Sequence[str]]:
    """The flags of a model that each run loads, or of a server that outlives the runs."""
    if where == "model":
        yield ["--model", str(model), *ENGINE_FLAGS]
        return
    with served(model, None, *ENGINE_FLAGS) as (_, client):
        yield ["--url", str(client.base_url)]


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def is_killed_at(num: int, command: Sequence[str], output: Path) -> bool:
    """Kill a run when the output has so many lines, unless it has written all of them before."""
    with subprocess.Popen(command, cwd=ROOT) as popen:
        deadline = time.monotonic() + 4 * PATIENCE
        while num_lines(output) < num:
            if popen.poll() is not None:  # a busy machine may look too late
                assert popen.returncode == 0
                return False
            assert time.monotonic() < deadline, "it makes no progress"
            time.sleep(0.01)
        popen.kill()
        return True


@pytest.mark.parametrize("where", ["model", "server"])
def test_every_line_is_there_once(where: str, tmp_path: Path, gptj_folder: Path) -> None:
    output = tmp_path / "out.jsonl"
    write_input(tmp_path / "in.jsonl")
    with target(where, gptj_folder) as flags:
        files = ("-i", str(tmp_path / "in.jsonl"), "-o", str(output))
        command = [sys.executable, "-m", "cottention.server", "run-batch", *files, *flags]
        num_killed = 0
        for kill in range(NUM_KILLS):
            done = num_lines(output)
            more = max(1, (NUM_LINES - done) // (NUM_KILLS - kill + 1))
            num_killed += is_killed_at(done + more, command, output)
        assert num_killed
        assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(line["custom_id"] for line in lines) == sorted(
        f"line {number}" for number in range(NUM_LINES)
    )
    for line in lines:
        text = line["response"]["body"]["choices"][0]["text"]
        number = int(line["custom_id"].removeprefix("line "))
        assert text.startswith(prompt(number)), "the answer of another line"

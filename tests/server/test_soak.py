"""A few seconds of the soak find wrong answers and leaks; times and memory are for a long run.

`make soak` takes half an hour.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak_clients import ids_of

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_short_soak_finds_nothing_wrong_and_nothing_leaked(
    gptj_folder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "benchmarks.soak", "--minutes", "0.1", "--clients", "40"]
    command += ["--model", str(gptj_folder), "--json", str(tmp_path / "report.json")]
    subprocess.run(command, cwd=ROOT, check=False, timeout=280)
    found = json.loads((tmp_path / "report.json").read_text())["soak"]
    assert found["whole answers"] > 20
    assert (found["wrong"], found["faults"], found["leaked slots"]) == (0, {}, 0)
    assert max(found["threads +"], found["fds +"]) <= 0


def test_an_event_that_was_cut_behind_a_brace_is_not_read() -> None:
    whole = b'3f\r\ndata: {"choices": [{"token_ids": [1, 2]}]}\n\n\r\n'
    assert ids_of(whole + b'41\r\ndata: {"choices": [{"logprobs": {}') == (1, 2)

"""A few seconds of the soak find wrong answers and leaks; times and memory are for a long run.

`make soak` takes half an hour.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_short_soak_finds_nothing_wrong_and_nothing_leaked(
    gptj_folder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "benchmarks.soak", "--minutes", "0.1", "--clients", "40"]
    command += ["--model", str(gptj_folder), "--json", str(tmp_path / "report.json")]
    subprocess.run(command, cwd=ROOT, check=False, timeout=100)
    found = json.loads((tmp_path / "report.json").read_text())["soak"]
    assert found["whole answers"] > 20
    assert (found["wrong"], found["faults"], found["leaked slots"]) == (0, {}, 0)
    assert max(found["threads +"], found["fds +"]) <= 0

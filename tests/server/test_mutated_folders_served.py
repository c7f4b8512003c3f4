"""Damaged model folders given to `cottention serve`: it serves, or ends in one line."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.engine.models.mutated_folders import make_good_folder, mutated_folder
from tests.server.process import ROOT

pytestmark = pytest.mark.slow


def exercise(model: Path, errors: Path) -> int | None:
    """Serve a model and complete a prompt; the exit status of a server that refuses it."""
    command = [sys.executable, "-m", "cottention.server", "serve", str(model), "--port", "0"]
    with (
        errors.open("w") as log,
        subprocess.Popen(
            [*command, "--max-slots", "1", "--threads", "1"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as popen,
    ):
        try:
            assert popen.stdout
            for line in popen.stdout:
                if line.startswith("ready"):
                    url = f"{line.split()[-1]}/v1/completions"
                    answer = httpx.post(url, json={"prompt": "def", "max_tokens": 2}, timeout=60)
                    assert answer.status_code == 200, answer.text
                    return None
            return popen.wait(60)
        finally:
            popen.kill()


@pytest.mark.parametrize("number", range(2000, 2020))
def test_a_mutated_folder_serves_or_ends_in_one_line(
    gptj_folder: Path, tmp_path: Path, number: int
) -> None:
    make_good_folder(gptj_folder, tmp_path / "good")
    model = tmp_path / "model"
    what = mutated_folder(tmp_path / "good", number, model)
    status = exercise(model, tmp_path / "log")
    lines = (tmp_path / "log").read_text().splitlines()
    assert not any("Traceback" in line or "panicked" in line for line in lines), (what, lines)
    if status is None:
        return
    assert status == 1, (what, lines)  # the model is refused: no setting is at fault
    assert lines[-1].startswith("cottention serve: "), (what, lines)
    assert str(model) in lines[-1], (what, lines)
    assert all(" WARNING " in line for line in lines[:-1]), (what, lines)

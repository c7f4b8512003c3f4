"""Bars are shown at a terminal while something takes a while, and nowhere else."""

import os
import re
import subprocess
import sys
from pathlib import Path

from cottention.engine.config import EngineConfig
from cottention.engine.engine import Engine
from cottention.engine.sampling_params import SamplingParams
from tests.engine.making import attention_folder
from tests.server.cli.at_terminal import ROOT, XTERM, at_terminal

WAITING = """
import logging, sys
from cottention.server.cli.progress import progress
from cottention.server.log_config import configure_logging
configure_logging("info", "text")
with progress("walking [far]") as report:
    report(1, 4)
    for line in sys.stdin:
        logging.info("on the way %s", line.strip())
        break
logging.info("there")
"""

COMPILER = """#!/bin/sh
for word; do [ "$before" = -o ] && made=$word; before=$word; done
case $made in *library.so) while ! [ -e "{go}" ]; do sleep 0.05; done ;; esac
touch "$made"
"""


def test_a_bar_is_there_while_something_takes_long_and_gone_after_it(tmp_path: Path) -> None:
    with at_terminal(tmp_path, environ=XTERM, program=(sys.executable, "-c", WAITING)) as it:
        it.shows("walking [far]")
        it.shows("25%")
        it.type("\n")
        it.shows("INFO on the way \n")
        it.shows("INFO there\n")
        assert it.ends() == 0
        [line] = [each for each in it.text.splitlines() if "on the way" in each]
        assert "walking" not in line.rpartition("\r")[2]
        assert "\x1b[?25h" in it.seen  # the cursor is shown again


def test_in_a_pipe_there_is_none() -> None:
    """Nor is the library that draws bars imported."""
    script = f"{WAITING}assert 'rich' not in sys.modules"
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=ROOT, input="\n", capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert [each.split("INFO ")[1] for each in done.stderr.splitlines()] == ["on the way ", "there"]


def test_compiling_counts_the_files(tmp_path: Path) -> None:
    """With a compiler that makes empty files, the last one only when the bar has been seen."""
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(go=tmp_path / "go"))
    compiler.chmod(0o700)
    environ = XTERM | {"COTTENTION_CACHE": str(tmp_path / "cache"), "CXX": str(compiler)}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with at_terminal(tmp_path, "build", environ=environ) as it:
        it.shows("compiling the ops")
        while not re.search(r" [1-9]\d?%", it.text):
            it.shows("%")
        (tmp_path / "go").touch()
        it.shows(".so\n")
        assert it.ends() == 0


def test_a_long_prompt_tells_how_far_it_is() -> None:
    engine = Engine(attention_folder("cottention"), EngineConfig(max_slots=1, max_batch_tokens=16))
    told: list[tuple[int, int]] = []
    params = SamplingParams(max_tokens=2)
    outputs = list(engine.stream([5] * 100, params, lambda done, total: told.append((done, total))))
    assert sum(len(each.token_ids) for each in outputs) == 2
    done = [each for each, _ in told]
    assert len(done) > 1
    assert done == sorted({*done})
    assert 0 < done[-1] < 100
    assert {total for _, total in told} == {100}

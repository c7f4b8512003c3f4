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

WATCHED = """
import sys
from cottention.server.cli.progress import progress
left = iter([0, 8, 8, 2])
with progress("reading", lambda: next(left, 2)):
    sys.stdin.readline()
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


def test_a_bar_asks_how_much_is_left(tmp_path: Path) -> None:
    """What chat shows of a long prompt: all there is is what was left at first."""
    program = (sys.executable, "-c", WATCHED)
    with at_terminal(tmp_path, environ=XTERM, program=program) as it:
        it.shows("reading")
        it.shows("75%")
        it.type("\n")
        assert it.ends() == 0


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
    left: list[int] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))
        left.append(engine.num_to_prefill)

    outputs = list(engine.stream([5] * 100, SamplingParams(max_tokens=2, ignore_eos=True), tell))
    assert sum(len(each.token_ids) for each in outputs) == 2
    done = [each for each, _ in told]
    assert len(done) > 1
    assert done == sorted({*done})
    assert 0 < done[-1] < 100
    assert {total for _, total in told} == {100}
    assert left == [100 - each for each in done]
    assert engine.num_to_prefill == 0

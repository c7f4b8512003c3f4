"""Every command that a page shows is run as it stands, and prints what the page says it prints.

A server of the shipped model listens in place of http://127.0.0.1:8000; commands run in a temporary
folder in which the names that pages use for models and files stand for small ones. A command that
serves is stopped when it is ready, and one that was left running with its block. README's blocks
are run by `make test`, those of other pages, some fifty processes, by `make test-slow`.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cottention.engine.models.model_folder import DEFAULT_MODEL
from tests.docs.pages import PAGES, ROOT, RUN, Block, blocks, matches
from tests.engine.encoders import encoder_folder
from tests.engine.making import model_folder, rwkv7_file
from tests.ports import free_port
from tests.server.process import served

SERVES = re.compile(r"^cottention serve\b(?!.*&\s*(?:#.*)?$)")
"""A line that serves in the foreground."""

TO_RUN = [
    pytest.param(block, id=block.name, marks=[] if page.name == "README.md" else pytest.mark.slow)
    for page in PAGES
    for block in blocks(page)
    if block.language in RUN and not (block.not_run or block.run_by)
]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server of the shipped model, as README starts one."""
    folder = tmp_path_factory.mktemp("sessions")
    with served(DEFAULT_MODEL, folder, "--chat-template", "plain") as (_, client):
        yield str(client.base_url.port)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small models under the names that pages use."""
    single = rwkv7_file(tmp_path_factory.mktemp("single"))
    vocabulary = single.parent / "rwkv_vocab_small.txt"
    return {
        "MODEL": model_folder("cottention"),
        "FOLDER": model_folder("rwkv7"),
        "ENCODER": encoder_folder(),
        "RWKV.pth": single,
        "VOCABULARY": vocabulary,
        "RWKV-x070-World-0.4B.pth": single,
        "rwkv_vocab_v20230424.txt": vocabulary,
    }


@pytest.fixture
def place(tmp_path: Path, stand_ins: dict[str, Path]) -> Path:
    """A folder with the files that pages name, and `bin` with the commands that they use."""
    for name, target in stand_ins.items():
        (tmp_path / name).symlink_to(target)
    commands = tmp_path / "bin"
    commands.mkdir()
    ours = {"cottention": "-m cottention.server", "python": "", "python3": ""}
    for name, arguments in ours.items():
        script = commands / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
        script.chmod(0o755)
    return tmp_path


@pytest.mark.timeout(1200)  # several processes that load torch, on a machine that does other things
@pytest.mark.parametrize("block", TO_RUN)
def test_it_does_what_the_page_says(block: Block, place: Path, port: str) -> None:
    text = block.text
    ports = {8000: free_port() if "cottention serve" in text else port, 9000: free_port()}
    for shown, real in ports.items():
        text = text.replace(str(shown), str(real))
    environment = os.environ | {
        "COTTENTION_PORT": str(ports[8000]),
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "namespace"), os.environ.get("PYTHONPATH", "")]),
    }
    if block.language == "python":
        printed = run([sys.executable, "-c", text], place, environment)
    else:
        printed = ""
        for part, is_server in parts_of(text):
            if is_server:
                start_and_stop(part, place, environment)
            else:
                printed += run(["bash", "-euo", "pipefail", "-c", part], place, environment)
    if block.answer is not None:
        assert matches(block.answer, printed), f"it prints {printed}"
    assert '"error"' not in printed


def parts_of(text: str) -> Iterator[tuple[str, bool]]:
    """The lines of a block, those that serve in the foreground by themselves."""
    others: list[str] = []
    for line in text.replace("\\\n", " ").splitlines():
        if not SERVES.match(line):
            others.append(line)
            continue
        if others:
            yield "\n".join(others), False
            others = []
        yield line, True
    if others:
        yield "\n".join(others), False


def run(command: list[str], place: Path, environment: dict[str, str]) -> str:
    """What a command prints. Whatever it leaves running in the background ends with it."""
    output = place / "output"
    with (
        output.open("w+", encoding="utf-8") as file,
        subprocess.Popen(
            command, cwd=place, env=environment, stdout=file, start_new_session=True
        ) as popen,
    ):
        try:
            status = popen.wait()
        finally:
            end_group(popen.pid)
    assert status == 0
    return output.read_text(encoding="utf-8")


def end_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def start_and_stop(line: str, place: Path, environment: dict[str, str]) -> None:
    """Run a line that serves until it is ready, and stop it as Ctrl-C does."""
    with subprocess.Popen(
        ["bash", "-c", f"exec {line}"],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as popen:
        assert popen.stdout
        try:
            assert any(told.startswith("ready") for told in popen.stdout), f"{line} did not start"
            popen.terminate()
            assert popen.wait() == 0
        finally:
            popen.kill()

"""SIGTERM and SIGINT before the server serves: the process ends soon, with its compilers.

Each process waits for a named pipe that the test holds open, so that the moment is certain.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.live import eventually

ROOT = Path(__file__).parents[3]
PATIENCE = 60.0
COMMAND = [sys.executable, "-m", "cottention.server"]
AS_PROCESS_1 = ["unshare", "--pid", "--fork", "--mount-proc"]


def can_unshare() -> bool:
    try:
        return subprocess.run([*AS_PROCESS_1, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@contextlib.contextmanager
def running(
    arguments: list[object], prefix: list[str] | None = None, **environ: str
) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [*(prefix or []), *COMMAND, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as popen:
        try:
            yield popen
        finally:
            popen.kill()


def arguments_with_pipe(flag: str, folder: Path) -> tuple[list[object], Path]:
    """A command that waits for a pipe, and the pipe."""
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    return ["serve", "--port", 0, flag, pipe], pipe


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("--config", signal.SIGINT),
        pytest.param("--api-key-file", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("--chat-template", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_during_start_ends_the_process(tmp_path: Path, where: str, number: int) -> None:
    arguments, pipe = arguments_with_pipe(where, tmp_path)
    with running(arguments) as popen:
        with pipe.open("wb"):  # opens when the process reads it
            popen.send_signal(number)
            assert popen.wait(PATIENCE) == 128 + number
        assert popen.stderr
        assert popen.stderr.read() == ""


@pytest.mark.skipif(not can_unshare(), reason="process namespaces cannot be made here")
@pytest.mark.slow
@pytest.mark.parametrize("where", ["--api-key-file", "under an init"])
def test_a_signal_ends_process_1(tmp_path: Path, where: str) -> None:
    prefix = AS_PROCESS_1
    if where == "under an init":
        tini = shutil.which("tini")
        if tini is None:
            pytest.skip("there is no tini")
        prefix, where = [*prefix, tini, "-s", "--"], "--config"
    arguments, pipe = arguments_with_pipe(where, tmp_path)
    with running(arguments, prefix) as popen, pipe.open("wb"):
        children = Path(f"/proc/{popen.pid}/task/{popen.pid}/children").read_text()
        os.kill(int(children), signal.SIGTERM)
        assert popen.wait(PATIENCE) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    "command",
    ["serve", "build", "info"],
)
@pytest.mark.slow
def test_a_signal_ends_the_compiler_too(tmp_path: Path, command: str) -> None:
    """One that runs a program of its own, as g++ does."""
    compiler, running_pids = tmp_path / "c++", tmp_path / "pids"
    compiler.write_text(f'#!/bin/sh\necho $$ >> "{running_pids}"\nsleep 600 & \necho $! >> '
                        f'"{running_pids}"\nwait\n')  # fmt: skip
    compiler.chmod(0o755)
    arguments: list[object] = [command, *(("--port", 0) if command == "serve" else ())]
    cache = str(tmp_path / "cache")
    environ = {"CXX": str(compiler), "COTTENTION_CACHE": cache, "COTTENTION_OPS": "compiled"}
    environ |= {"XDG_CACHE_HOME": cache}
    with running(arguments, **environ) as popen:
        eventually(lambda: running_pids.exists() and len(running_pids.read_text().split()) >= 2)
        popen.send_signal(signal.SIGTERM)
        assert popen.wait(PATIENCE) == 128 + signal.SIGTERM
    pids = running_pids.read_text().split()
    eventually(lambda: [pid for pid in pids if is_running(pid)], equals=[])
    assert [*(tmp_path / "cache").rglob(".build-*")] == []


def is_running(pid: str) -> bool:
    try:
        return Path("/proc", pid, "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_signal_ends_code_that_swallows_exceptions() -> None:
    """As in a destructor, or in a library that catches everything."""
    code = (
        "import time\n"
        "from cottention.server.cli.signals import exit_on_signals\n"
        "exit_on_signals(); print('ready', flush=True)\n"
        "while True:\n"
        "    try: time.sleep(60)\n"
        "    except BaseException: pass\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as popen:
        assert popen.stdout
        assert popen.stdout.readline() == "ready\n"
        popen.send_signal(signal.SIGTERM)
        assert popen.wait(PATIENCE) == 128 + signal.SIGTERM


def test_an_ignored_interrupt_stays_ignored() -> None:
    """A shell without job control starts what runs in the background like this."""
    code = (
        "import signal\n"
        "from cottention.server.cli.signals import exit_on_signals\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "exit_on_signals(); print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)\n"
        "print(signal.getsignal(signal.SIGTERM) == signal.SIG_IGN)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False"]

"""Standard streams that are closed, full, without a reader, or in an encoding without letters."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

from cottention.engine.standard_streams import (
    OutputError,
    ReaderGoneError,
    dropping_stream,
    write_notice,
    write_output,
)
from tests.ports import free_port
from tests.server.live import PATIENCE, eventually

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-m", "cottention.server"]
CLOSED, FULL, GONE = "closed", "full", "without a reader"


@contextlib.contextmanager
def broken(kind: str) -> Iterator[int]:
    """A descriptor for a process's output."""
    if kind == FULL:
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:  # one that is to be closed is closed by the shell
        reader, descriptor = os.pipe()
        os.close(reader)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def shell(kind: str, *descriptors: int) -> list[str]:
    """What runs a command, with these descriptors closed where they are to be."""
    redirections = " ".join(f"{each}>&-" for each in descriptors) if kind == CLOSED else ""
    return ["sh", "-c", f'exec "$0" "$@" {redirections}']


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def check_service(popen: "subprocess.Popen[Any]", port: int, model: str) -> None:
    """It serves, whatever becomes of its output, and stops."""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
        eventually(lambda: is_ready(client) or popen.poll() is not None)
        body = {"prompt": "def f(", "max_tokens": 5, "model": model}
        answers = [client.post("/v1/completions", json=body) for _ in range(3)]
    assert [each.status_code for each in answers] == [200] * 3
    popen.send_signal(signal.SIGTERM)
    assert popen.wait(PATIENCE) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("output", "errors"), [(CLOSED, CLOSED), (FULL, GONE)])
def test_a_server_needs_no_output(
    gptj_folder: Path, tmp_path: Path, output: str, errors: str
) -> None:
    """Of each kind; which of the two streams it is makes no difference to `dropping_stream`."""
    folder, port = shutil.copytree(gptj_folder, tmp_path / "tiny"), free_port()
    command = [*shell(output, 1, 2), *COMMAND, "serve", str(folder), "--port", str(port)]
    with (
        broken(output) as stdout,
        broken(errors) as stderr,
        subprocess.Popen(
            [*command, "--max-slots", "2"],
            cwd=ROOT,
            stdout=stdout,
            stderr=stderr,
            env=os.environ | {"COTTENTION_UNKNOWN": "a warning at start"},
        ) as popen,
    ):
        try:
            check_service(popen, port, "tiny")
        finally:
            popen.kill()


@pytest.mark.slow
def test_a_server_whose_encoding_lacks_letters(gptj_folder: Path, tmp_path: Path) -> None:
    folder, port = shutil.copytree(gptj_folder, tmp_path / "modèle"), free_port()
    sessions = tmp_path / "séances"
    command = [*COMMAND, "serve", str(folder), "--port", str(port), "--max-slots", "2"]
    with subprocess.Popen(
        [*command, "--session-dir", str(sessions)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONIOENCODING": "ascii:strict"},
    ) as popen:
        try:
            check_service(popen, port, "modèle")
            assert popen.stdout
            assert b"mod\\xe8le" in popen.stdout.read()
        finally:
            popen.kill()


@pytest.mark.parametrize(
    ("command", "kind", "status", "says"),
    [
        ("config", GONE, 141, ""),
        ("config --json", FULL, 1, "No space left"),
        ("serve --help", FULL, 1, "No space left"),
        ("serve --help", GONE, 141, ""),
        ("--version", CLOSED, 1, "cannot write to standard output"),
    ],
)
def test_a_command_says_that_its_output_is_lost(
    command: str, kind: str, status: int, says: str
) -> None:
    check_loss(command.split(), kind, status, says)


@pytest.mark.parametrize(
    ("command", "kind", "status", "says"),
    [
        pytest.param("generate", GONE, 141, "", marks=pytest.mark.slow),
        ("info", FULL, 1, "No space left"),
    ],
)
def test_a_command_with_a_model_says_it_too(
    gptj_folder: Path, command: str, kind: str, status: int, says: str
) -> None:
    flags = ["x", "--max-tokens", "3", "--model"] if command == "generate" else []
    check_loss([command, *flags, str(gptj_folder)], kind, status, says)


def check_loss(arguments: list[str], kind: str, status: int, says: str) -> None:
    with broken(kind) as output:
        done = subprocess.run(
            [*shell(kind, 1), *COMMAND, *arguments],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == status, done.stderr
    assert says in done.stderr
    assert done.stderr.count("\n") == (1 if says else 0)


def test_a_prompt_is_asked_for_where_standard_input_is_closed() -> None:
    command = ["sh", "-c", 'exec "$0" "$@" <&-', *COMMAND, "generate"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("cottention generate: standard input is closed; ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", [CLOSED, FULL, GONE])
def test_a_dropping_stream_never_fails(kind: str) -> None:
    with broken(GONE if kind == CLOSED else kind) as descriptor:
        stream = dropping_stream(1_000_000 if kind == CLOSED else descriptor, None)
        for _ in range(100):
            stream.write("é" * 1000 + "\n")
        stream.flush()


def test_a_dropping_stream_takes_up_again_and_keeps_every_letter() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(65_536))
    with (ROOT / "README.md").open(encoding="ascii") as like:
        stream = dropping_stream(writer, like)
    stream.write("lost\n")
    while len(os.read(reader, 1 << 20)) == 1 << 20:
        pass
    stream.write("é again\n")
    assert b"\\xe9 again\n" in os.read(reader, 1 << 20)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(
    ("opened", "error"),
    [
        (lambda path: path.open("w", encoding="ascii"), OutputError),
        (lambda _: os.fdopen(os.open("/dev/full", os.O_WRONLY), "w"), OutputError),
        (lambda path: path.open(encoding="utf-8"), OutputError),
        (lambda _: gone_pipe(), ReaderGoneError),
    ],
    ids=["letters", "full", "read only", "gone"],
)
def test_output_raises_and_a_notice_does_not(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    opened: Callable[[Path], IO[str]],
    error: type[Exception],
) -> None:
    (tmp_path / "file").touch()
    stream: Any = opened(tmp_path / "file")
    write_notice("é\n", stream)
    write_notice("é\n", None)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with pytest.raises(error):
            write_output("é\n")
    with contextlib.suppress(OSError):
        stream.close()


def gone_pipe() -> IO[str]:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", encoding="utf-8")

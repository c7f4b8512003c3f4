"""The wheel serves where there is no compiler: compiled ops, the model, the page, the same text."""

import contextlib
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.wheel.conftest import ROOT

GENERATE = ("generate", "import os", "--max-tokens", "24", "--temperature", "0")


@pytest.fixture(scope="session")
def environment(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables with no compiler to be found, no cache of ours, and none of this checkout."""
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if name in ("LANG", "TMPDIR")}
    return kept | {"PATH": str(installed), "HOME": str(home), "COTTENTION_OPS": "compiled"}


def run(environment: dict[str, str], *command: str) -> "subprocess.CompletedProcess[str]":
    """Run a command of the fresh environment, outside of the checkout."""
    path = Path(environment["PATH"], command[0])
    return subprocess.run(
        [path, *command[1:]],
        env=environment,
        cwd=environment["HOME"],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_name_of_the_file_says_where_it_runs(wheel: Path) -> None:
    """auditwheel tells the oldest C library; Debian 12 and the images of today have a newer one."""
    assert re.search(r"-py3-none-manylinux_2_(\d+)_\w+\.whl$", wheel.name)
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
    [library] = [name for name in names if ".so" in name]
    assert library.startswith("cottention/engine/ops/_prebuilt/cottention-")


def test_it_computes_with_the_compiled_ops_that_it_brought(environment: dict[str, str]) -> None:
    code = "from cottention.engine.ops import build, loader; print(build.find(), loader.backend())"
    told = run(environment, "python", "-c", code)
    path, backend = told.stdout.split()
    assert Path(path).is_relative_to(Path(environment["PATH"]).parent)
    assert backend == "compiled"
    without = run(
        environment, "python", "-c", "from cottention.engine.ops.build import *; compiler()"
    )
    assert "no C++ compiler" in without.stderr


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512", "avx512_bf16"])
def test_it_has_every_instruction_set(environment: dict[str, str], isa: str) -> None:
    done = run(environment | {"COTTENTION_CPU_ISA": isa}, "cottention", *GENERATE)
    if f"COTTENTION_CPU_ISA={isa}" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_it_writes_what_the_checkout_writes(environment: dict[str, str]) -> None:
    checkout = subprocess.run(
        [sys.executable, "-m", "cottention.server", *GENERATE],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "namespace")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run(environment, "cottention", *GENERATE).stdout == checkout.stdout


def test_from_the_command_to_the_first_streamed_token(
    installed: Path, environment: dict[str, str], measured: dict[str, float]
) -> None:
    """What a user waits for after the installation; `make test-wheel` tells how long it took."""
    for what in ("first start", "second start"):
        start = time.perf_counter()
        with serving(installed, environment) as client:
            body: dict[str, Any] = {"prompt": "def ", "max_tokens": 4, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as answer:
                assert next(answer.iter_lines()).startswith("data: ")
                measured[f"from `cottention serve` to the first token, {what}"] = (
                    time.perf_counter() - start
                )


@pytest.fixture
def served(installed: Path, environment: dict[str, str]) -> Iterator[httpx.Client]:
    """A client of `cottention serve`."""
    with serving(installed, environment) as client:
        yield client


@contextlib.contextmanager
def serving(installed: Path, environment: dict[str, str]) -> Iterator[httpx.Client]:
    """The server of the fresh environment, killed at the end, and a client of it."""
    command = [str(installed / "cottention"), "serve", "--port", "0"]
    with subprocess.Popen(
        command, env=environment, cwd=environment["HOME"], stdout=subprocess.PIPE, text=True
    ) as popen:
        try:
            assert popen.stdout
            lines = iter(popen.stdout.readline, "")
            url = next(line.split()[-1] for line in lines if line.startswith("ready"))
            with httpx.Client(base_url=url, timeout=60) as client:
                yield client
        finally:
            popen.kill()


def test_it_serves_the_page_and_a_stream(served: httpx.Client) -> None:
    assert "<title>cottention-server</title>" in served.get("/").text
    assert served.get("/ui/main.js").status_code == 200
    body: dict[str, Any] = {"prompt": "def ", "max_tokens": 4, "stream": True}
    assert served.post("/v1/completions", json=body).text.endswith("data: [DONE]\n\n")

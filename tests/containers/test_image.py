"""The image by itself: what is in it, how large it is, what it does without any configuration."""

import json
import re
import time

from tests.containers.compose import run

EXTRA_MB = 60
"""What the image may have beside its base and torch as pip installs it."""

TORCH_BYTES = """
import importlib.metadata as m, pathlib, re
names, todo = set(), ["torch"]
while todo:
    name = re.sub("[-_.]+", "-", todo.pop()).lower()
    if name not in names:
        names.add(name)
        needed = [line for line in m.requires(name) or () if "extra ==" not in line]
        todo += [re.match("[A-Za-z0-9._-]+", line)[0] for line in needed]
size = 0
for file in (file for name in names for file in m.files(name) or ()):
    path = pathlib.Path(file.locate())
    size += path.stat().st_size if path.exists() else file.size or 0
print(size)
"""
"""In the container: bytes of torch and all it needs, those that were taken out included."""


def python(code: str, *flags: str) -> str:
    """What a program prints in a fresh container."""
    how = ["--rm", "--read-only", "--network", "none", *flags, "--entrypoint", "python"]
    return run("docker", "run", *how, "cottention-server", "-c", code)


def size_of(image: str) -> int:
    return int(run("docker", "image", "inspect", "--format", "{{.Size}}", image))


def test_its_size(image: str) -> None:
    whole, base = size_of(image), size_of("python:3.11-slim-bookworm")
    torch = int(python(TORCH_BYTES))
    extra = whole - base - torch
    print(f"image {whole / 1e6:.0f} MB = base {base / 1e6:.0f} + torch {torch / 1e6:.0f}", end="")
    print(f" + {extra / 1e6:.0f} MB")
    assert extra <= EXTRA_MB * 1e6


def test_what_it_declares(image: str) -> None:
    declared = json.loads(run("docker", "image", "inspect", "--format", "{{json .Config}}", image))
    assert declared["User"] == "10001:10001"
    assert declared["StopSignal"] == "SIGTERM"
    assert declared["Entrypoint"] == ["tini", "-s", "--", "cottention"]
    assert declared["Cmd"] == ["serve"]
    assert declared["Healthcheck"]["Test"][:2] == ["CMD", "python"]
    assert declared["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_the_compiled_ops_are_found_without_a_compiler(image: str) -> None:
    assert image
    code = (
        "import shutil; from cottention.engine.ops import backend;"
        "print(backend(), *map(shutil.which, ('c++', 'g++', 'gcc', 'cc', 'nvcc', 'pip')))"
    )
    ours = python(code).split()
    assert ours[:6] == ["compiled", *["None"] * 5]


def test_its_library_came_with_the_wheel_and_has_every_instruction_set(image: str) -> None:
    """By the namespaces in its symbols; which of them runs is chosen where it is loaded."""
    assert image
    code = (
        "from cottention.engine.ops import build;"
        "library = build.find(); print(library); raw = library.read_bytes();"
        "print([f'{len(isa)}{isa}'.encode() in raw for isa in build.KERNEL_FLAGS])"
    )
    path, found = python(code).splitlines()
    assert re.fullmatch(r"/opt/cottention/lib/.*/cottention/engine/ops/_prebuilt/[\w-]+\.so", path)
    assert found == str([True] * 4)


def test_it_has_what_traces_need(image: str) -> None:
    assert image
    code = "from cottention.server.observability.tracing import Tracing; Tracing('http://host', '')"
    python(code)


def test_all_its_files_have_one_time(image: str) -> None:
    assert image
    code = (
        "import pathlib; root = pathlib.Path('/opt/cottention');"
        "print({int(p.lstat().st_mtime) for p in root.rglob('*')})"
    )
    assert python(code).strip() == "{1767225600}"


def test_a_stop_right_after_the_start_does_not_wait_to_be_killed(image: str) -> None:
    """143 is SIGTERM's status, 137 that of the kill which the engine sends when time is up."""
    container = run("docker", "run", "--detach", image).strip()
    run("docker", "stop", "--time", "60", container)
    status = run("docker", "inspect", "--format", "{{.State.ExitCode}}", container).strip()
    run("docker", "rm", container)
    assert status in ("143", "0")


def test_without_configuration_it_listens_on_localhost_and_says_how_to_open_it(image: str) -> None:
    container = run("docker", "run", "--detach", "--rm", image).strip()
    try:
        logs = ""
        for _ in range(300):
            logs = run("docker", "logs", container)
            if "ready" in logs:
                break
            time.sleep(0.1)
        told = dict(line.split(None, 1) for line in logs.splitlines())
        assert told["ready"] == "http://127.0.0.1:8000"
        assert told["access"].startswith("localhost only; no API key required")
        assert (
            "use --host 0.0.0.0 to open it, --api-key-file FILE to require keys" in told["access"]
        )
        assert told["model"] == "cottention-python-7m, float32 on cpu, compiled ops"
        assert told["memory"].startswith("64 slots of 786,432 bytes")
        assert told["sessions"] == "kept in /sessions"
    finally:
        run("docker", "kill", container)

"""What `.ci/run` says at its end, and what is installed: neither runs in the tests otherwise."""

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = """<testsuites><testsuite><testcase name="a"/>
<testcase name="b"><skipped message="no CUDA device"/></testcase>
<testcase name="c"><skipped message="no CUDA device"/></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize(
    ("status", "last"),
    [(0, ".ci/run: check, test, docker-test passed"), (2, ".ci/run FAILED in docker-test")],
)
def test_a_run_ends_with_what_was_skipped_and_why(tmp_path: Path, status: int, last: str) -> None:
    logs = {
        "check": "promtool, alerts: skipped, there is no promtool\n",
        "test": "1 passed, 2 skipped\n",
        "docker-test": "SKIP docker-test: there is no dockerd\n",
    }
    for place, (name, log) in enumerate(logs.items()):
        (tmp_path / f"{name}.log").write_text(log)
        os.utime(tmp_path / f"{name}.log", (place, place))
    (tmp_path / "test.xml").write_text(RESULTS)
    command = [sys.executable, ROOT / ".ci" / "skipped", tmp_path, str(status)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert done.stdout.splitlines()[2:] == [
        "check: 1 x promtool, alerts: skipped, there is no promtool",
        "test: 2 x no CUDA device",
        "docker-test: 1 x all of it, there is no dockerd",
        "In all 4 were skipped.",
        last,
    ]


@pytest.mark.parametrize(("words", "status"), [((), 0), (("PostgreSQL", "HAProxy"), 1)])
def test_what_a_machine_can_install_is_never_skipped(
    tmp_path: Path, words: tuple[str, ...], status: int
) -> None:
    """Or the tests of many servers would be skipped for years, and a green run say nothing."""
    (tmp_path / "test-cluster.log").write_text("SKIP install-postgres: no PostgreSQL\n")
    command = [sys.executable, ROOT / ".ci" / "skipped", tmp_path, "0", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert ("for want of PostgreSQL" in done.stdout) == bool(status)


def test_the_command_is_there_and_every_package_is_installed() -> None:
    """Nothing here is run from the wheel: what it would lack shows in nobody's checkout."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for target in project["project"]["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
    found = {
        ".".join(("cottention", *path.parent.relative_to(ROOT).parts))
        for top in ("engine", "server")
        for path in (ROOT / top).rglob("__init__.py")
    }
    listed = project["tool"]["setuptools"]["packages"]
    assert {name for name in listed if not name.startswith("cottention.csrc")} == found

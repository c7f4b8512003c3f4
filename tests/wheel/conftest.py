"""The wheel in an environment of its own, on a PATH without a compiler.

Only `make test-wheel` says that there is a wheel to test; otherwise there is nothing to collect.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

if "COTTENTION_TEST_WHEEL" not in os.environ:
    collect_ignore_glob = ["test_*.py"]


_SECONDS = pytest.StashKey[dict[str, float]]()


def pytest_configure(config: pytest.Config) -> None:
    """Nothing has been measured."""
    config.stash[_SECONDS] = {}


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> dict[str, float]:
    """Seconds that tests have measured, by what they are of."""
    return pytestconfig.stash[_SECONDS]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Tell what was measured; nothing depends on it."""
    for what, seconds in config.stash[_SECONDS].items():
        terminalreporter.write_line(f"{what}: {seconds:.1f} s")


@pytest.fixture(scope="session")
def wheel() -> Path:
    """The file that `make wheel` built."""
    [found] = Path(os.environ["COTTENTION_TEST_WHEEL"]).glob("cottention_server-*.whl")
    return found


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands of a fresh environment, with torch and the wheel."""
    folder = tmp_path_factory.mktemp("wheel") / "environment"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip: list[str | Path] = [
        folder / "bin" / "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    pip += ["--constraint", ROOT / "constraints.txt"]
    subprocess.run([*pip, "torch==2.13.0", "setuptools"], check=True)
    subprocess.run([*pip, wheel], check=True)
    return folder / "bin"

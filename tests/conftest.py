"""What tests of several rooms share: where the golden cases are, and a small disk."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.postgres import Postgres, running_postgres

_OWN_COPY = Path(__file__).parent / "data" / "golden"

# A shell without job control starts what runs in the background with SIGINT ignored, and processes
# inherit that: those that the tests start could not be interrupted.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of golden cases for the tests of that name: COTTENTION_GOLDEN, or our own copy."""
    return Path(os.environ.get("COTTENTION_GOLDEN", _OWN_COPY))


@pytest.fixture(scope="session")
def gptj_folder() -> Path:
    """A small causal Cottention model with random weights, as a Hugging Face folder."""
    return _OWN_COPY / "cottention-gptj"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL for all tests that neither kill nor crash it; skipped where there is none."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """8 MiB of memory as a disk; skipped where this user cannot mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount")
    if done.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a failed test has files open

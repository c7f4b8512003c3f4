"""One image and one compose project for all tests; without an engine nothing is collected."""

import os
import time
from collections.abc import Iterator

import pytest

from tests.containers.compose import compose, is_healthy, up, wait_for

if "CTR_INNER" not in os.environ:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def image() -> str:
    """The CPU's image, built as a user builds it."""
    compose("build", "server")
    return "cottention-server"


@pytest.fixture(scope="session")
def seconds_to_healthy(image: str) -> Iterator[float]:
    """Start the default service; it goes with its volumes at the end."""
    assert image
    started = time.monotonic()
    up()
    wait_for(is_healthy)
    yield time.monotonic() - started
    compose("down", "--volumes", "--timeout", "5")


@pytest.fixture
def service(seconds_to_healthy: float) -> Iterator[None]:
    """A service that runs with its defaults; what it logs is shown with a failure."""
    assert seconds_to_healthy
    up()
    yield
    print(compose("logs", "--no-color", "--no-log-prefix", "--tail", "40", "server"))

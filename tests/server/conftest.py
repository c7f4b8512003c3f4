"""Servers shared by tests that leave nothing behind."""

from collections.abc import Iterator

import pytest

from tests.server.live import Live, serving


@pytest.fixture(scope="session")
def shared() -> Iterator[Live]:
    """One server for all tests that only ask."""
    with serving(max_body_bytes=200_000) as live:
        yield live

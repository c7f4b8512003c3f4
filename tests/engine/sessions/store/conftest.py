"""The stores that every test of `SessionStore`'s promises runs over."""

from collections.abc import Iterator

import pytest

from cottention.engine.sessions.store import SessionStore
from tests.engine.sessions.store.backends import Backend, PostgresBackend, SqliteBackend


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.cluster)])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """A place for sessions; PostgreSQL runs only where a test needs it."""
    if request.param == "sqlite":
        made: Backend = SqliteBackend()
    else:
        made = PostgresBackend(request.getfixturevalue("postgres"))
    yield made
    made.remove()


@pytest.fixture
def store(backend: Backend) -> Iterator[SessionStore]:
    opened = backend.open()
    yield opened
    opened.close()

"""The stores that keep what `SessionStore` promises, as tests open, close and age them."""

import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cottention.engine.sessions.store import SessionStore, SqliteStore
from cottention.engine.sessions.store.protocol import UNLIMITED, Quotas
from tests.engine.postgres import PASSWORD, Postgres

if TYPE_CHECKING:  # it needs psycopg, an extra
    from cottention.engine.sessions.store.postgres.store import PostgresStore


class Backend(ABC):
    """A place for sessions, whose time passes when it is told to."""

    @abstractmethod
    def open(self, quotas: Quotas = lambda _: UNLIMITED) -> SessionStore: ...

    @abstractmethod
    def pass_time(self, seconds: float) -> None:
        """Let lifetimes and leases be older by this."""

    @abstractmethod
    def remove(self) -> None:
        """After all stores are closed."""


@dataclass
class Clock:
    """Time that passes when it is told to."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class SqliteBackend(Backend):
    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name) / "sessions"
        self.clock = Clock()

    def open(self, quotas: Quotas = lambda _: UNLIMITED) -> SessionStore:
        return SqliteStore(
            self.folder, durable=False, quotas=quotas, clock=self.clock, monotonic=self.clock
        )

    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    def remove(self) -> None:
        self._folder.cleanup()


class PostgresBackend(Backend):
    def __init__(self, server: Postgres) -> None:
        self._server = server
        self.url = server.url
        self.execute("DROP SCHEMA IF EXISTS cottention CASCADE")

    def open(self, quotas: Quotas = lambda _: UNLIMITED) -> "PostgresStore":
        from cottention.engine.sessions.store.postgres.store import PostgresStore

        return PostgresStore(self._server.url, password=PASSWORD, quotas=quotas)

    def pass_time(self, seconds: float) -> None:
        """The database's clock cannot be set: everything becomes older instead."""
        self.execute(
            "UPDATE cottention.sessions SET expires_at = expires_at - %(seconds)s,"
            " lease_until = lease_until - make_interval(secs => %(seconds)s)",
            {"seconds": seconds},
        )
        self.execute(
            "UPDATE cottention.answers SET until = until - make_interval(secs => %s)", [seconds]
        )

    def remove(self) -> None:
        """The next one does it."""

    def execute(self, statement: str, values: Any = None) -> list[Any]:
        """The rows of a statement in a connection of its own."""
        import psycopg

        with psycopg.connect(self._server.url, password=PASSWORD, autocommit=True) as db:
            found = db.execute(statement, values)
            return found.fetchall() if found.description else []

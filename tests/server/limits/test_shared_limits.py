"""Limits of a key at three servers over one PostgreSQL."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cottention.engine.sessions.store.postgres.store import PostgresStore
from cottention.server.limits import shared_limits
from tests.engine.postgres import PASSWORD, Postgres, running_postgres
from tests.server.fake_sessions import FakeSessions
from tests.server.live import Live, eventually, serving

pytestmark = pytest.mark.cluster


@contextlib.contextmanager
def servers(postgres: Postgres, num: int, **settings: Any) -> Iterator[list[Live]]:
    """Servers whose keys are counted in the database."""
    with contextlib.ExitStack() as stack:
        lives = []
        for n in range(num):
            store = PostgresStore(postgres.url, password=PASSWORD, name=f"replica {n}")
            stack.callback(store.close)
            sessions = FakeSessions(key_ledger=store.key_ledger)
            lives.append(stack.enter_context(serving(sessions=sessions, **settings)))
        yield lives


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that answers late is waited for: without it a server counts alone."""
    monkeypatch.setattr(shared_limits, "ANSWER_SECONDS", 30.0)


@pytest.fixture
def empty(postgres: Postgres) -> Postgres:
    with psycopg.connect(postgres.url, password=PASSWORD) as db:
        db.execute("DROP SCHEMA IF EXISTS cottention CASCADE")
    return postgres


def status(live: Live) -> int:
    return live.complete(prompt="x", max_tokens=1).status_code


@pytest.mark.usefixtures("patient")
def test_requests_that_run_anywhere_count_everywhere(empty: Postgres, tmp_path: Path) -> None:
    """Else a key would have as many times its limit as there are servers; another key has its own.

    A server that has ended holds nothing.
    """
    keys = tmp_path / "keys"
    keys.write_text('{"a": {"key": "one", "max_requests": 2}, "b": {"key": "two"}}')
    with servers(empty, 3, api_key_file=str(keys)) as [one, two, three]:
        for live in (one, two, three):
            live.client.headers["authorization"] = "Bearer one"
        with servers(empty, 1, api_key_file=str(keys)) as [fourth]:
            fourth.client.headers["authorization"] = "Bearer one"
            for live in (one, fourth):
                live.engine.may_step.clear()
            socks = [live.connect(prompt="x") for live in (one, fourth)]
            eventually(lambda: [status(two), status(three)], equals=[429, 429])
            refused = two.complete(prompt="x").json()["error"]
            assert "is 2" in refused["message"]
            other = two.client.post(
                "/v1/completions", json={"prompt": "x"}, headers={"authorization": "Bearer two"}
            )
            assert other.status_code == 200
            fourth.engine.may_step.set()
            socks.pop().close()
        eventually(lambda: [status(two), status(three)], equals=[200, 200])
        one.engine.may_step.set()
        socks.pop().close()


@pytest.mark.usefixtures("patient")
def test_tokens_of_a_minute_are_those_of_all_servers(empty: Postgres) -> None:
    """One server uses more than a minute has: the others refuse what they never had a part of."""
    with servers(empty, 3, key_max_tokens_per_minute=60) as [one, two, three]:
        assert [status(each) for each in (one, two, three)] == [200] * 3
        assert one.complete(prompt="x" * 600, max_tokens=1).status_code == 200
        eventually(lambda: [status(two), status(three), status(one)], equals=[429] * 3)
        answer = two.complete(prompt="x")
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert 60 < int(answer.headers["retry-after"]) < 660


def test_a_database_that_is_away_leaves_each_server_its_own_limit() -> None:
    """Requests without a session go on, and neither without bound nor refused for good."""
    with (
        running_postgres() as postgres,
        servers(postgres, 2, key_max_tokens_per_minute=60) as [one, two],
    ):
        assert [status(one), status(two)] == [200, 200]
        assert one.complete(prompt="x" * 6000, max_tokens=1).status_code == 200
        eventually(lambda: status(two), equals=429)
        postgres.stop(signal.SIGQUIT)
        eventually(lambda: status(two), equals=200)
        two.complete(prompt="x" * 6000, max_tokens=1)
        eventually(lambda: status(two), equals=429)

"""Two servers over one PostgreSQL: their sessions are the same, and end nowhere with a server."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cottention.engine.config import EngineConfig
from cottention.engine.engine import Engine
from cottention.engine.errors import ConfigurationError
from cottention.server.config import ServerConfig
from cottention.server.sessions.storage import describe_storage, open_sessions
from tests.engine.making import model_folder
from tests.engine.postgres import PASSWORD, Postgres, running_postgres
from tests.server.live import Live, eventually, serving
from tests.server.process import served

pytestmark = pytest.mark.cluster

BODY: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "seed": 5}


@contextlib.contextmanager
def server(postgres: Postgres, folder: Path, **settings: Any) -> Iterator[Live]:
    """A server of its own engine, whose sessions are in the database."""
    file = folder / "password"
    file.write_text(PASSWORD)
    engine_settings = {name: settings.pop(name) for name in ("context_policy",) if name in settings}
    engine = Engine(model_folder("cottention"), EngineConfig(max_slots=4, **engine_settings))
    config = ServerConfig(
        session_store=postgres.url, session_store_password_file=str(file), **settings
    )
    with open_sessions(engine, config) as sessions, serving(engine, sessions=sessions) as live:
        yield live


def sizes(postgres: Postgres) -> list[int]:
    with psycopg.connect(postgres.url, password=PASSWORD) as db:
        return [n for (n,) in db.execute("SELECT nbytes FROM cottention.blobs ORDER BY nbytes")]


@pytest.fixture
def empty(postgres: Postgres) -> Postgres:
    with psycopg.connect(postgres.url, password=PASSWORD) as db:
        db.execute("DROP SCHEMA IF EXISTS cottention CASCADE")
    return postgres


def turns(lives: list[Live], num: int) -> list[Any]:
    """What a session says in turns that go round the servers, and the last one's events."""
    session_id = lives[0].opened("def f(x):")
    said = []
    for n in range(num):
        live = lives[n % len(lives)]
        answer = live.complete(prompt=f" return {n}", session_id=session_id, **BODY)
        assert answer.status_code == 200
        said.append(answer.json()["choices"][0]["text"])
    exported = lives[-1].client.get(f"/v1/sessions/{session_id}/snapshot")
    assert exported.status_code == 200
    return [*said, exported.content]


def test_turns_on_any_server_are_those_of_one(empty: Postgres, tmp_path: Path) -> None:
    """Stored as recipes or with their states; both longer than the model's window."""
    with server(empty, tmp_path) as one, server(empty, tmp_path, session_memory=0) as two:
        by_both = turns([one, two], 6)
        by_one = turns([one], 6)
        recipes = sizes(empty)
    with server(empty, tmp_path, session_states="always") as three:
        whole = turns([three], 6)
        states = sizes(empty)
    assert by_both == by_one
    assert whole[:-1] == by_one[:-1]
    assert max(recipes) < max(states)


def test_a_snapshot_of_ids_is_imported_anywhere(empty: Postgres, tmp_path: Path) -> None:
    with server(empty, tmp_path) as live:
        *_, raw = turns([live], 6)
        config = ServerConfig(session_dir=str(tmp_path / "folder"))
        engine = Engine(model_folder("cottention"), EngineConfig(max_slots=4))
        with open_sessions(engine, config) as sessions, serving(engine, sessions=sessions) as other:
            said = []
            for each in (live, other):
                made = each.client.post("/v1/sessions/import", content=raw)
                assert made.status_code == 200, made.text
                answer = each.complete(prompt="x", session_id=made.json()["id"], **BODY)
                said.append(answer.json()["choices"][0]["text"])
            assert said[0] == said[1]


def test_a_database_that_is_away_costs_sessions_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is kept in memory for later: another server may go on from what is stored."""
    where = "cottention.engine.sessions.store.postgres"
    monkeypatch.setattr(f"{where}.connections.RETRY_SECONDS", 0.5)
    with running_postgres() as postgres, server(postgres, tmp_path) as live:
        session_id = live.opened("def f(x):")
        position = live.session(session_id)["position"]
        postgres.stop(signal.SIGQUIT)
        for answer in (
            live.complete(prompt="x", session_id=session_id, **BODY),
            live.client.get(f"/v1/sessions/{session_id}"),
            live.client.post("/v1/sessions", json={"prompt": "y"}),
        ):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "store_unreachable"
            assert int(answer.headers["retry-after"]) > 0
            assert PASSWORD not in answer.text
        asleep = live.client.get("/ready?sessions=1")
        assert asleep.status_code == 503
        assert asleep.json()["error"]["code"] == "store_unreachable"
        assert "no heartbeat has reached the database" in asleep.json()["error"]["message"]
        assert int(asleep.headers["retry-after"]) > 0
        assert live.client.get("/ready").status_code == 200
        assert live.complete(prompt="x", max_tokens=2).status_code == 200
        assert live.client.get("/health").status_code == 200
        postgres.start()
        eventually(lambda: live.client.get("/ready?sessions=1").status_code, equals=200)
        answer = live.complete(prompt="x", session_id=session_id, **BODY)
        assert answer.status_code == 200
        assert live.session(session_id)["position"] == position + 1 + BODY["max_tokens"]


def test_a_model_whose_states_are_too_large_is_refused_with_their_size(
    empty: Postgres, tmp_path: Path
) -> None:
    small: dict[str, Any] = {"max_stored_state": 10_000}
    for settings in ({"session_states": "always"}, {"context_policy": "exact"}):
        with (
            pytest.raises(ConfigurationError, match=r"takes up to \d+ bytes, more than --max-st"),
            server(empty, tmp_path, **small, **settings),
        ):
            pass
    with server(empty, tmp_path, **small) as live:
        live.opened("its ids are few")


def test_the_password_is_nowhere(empty: Postgres, tmp_path: Path) -> None:
    config = ServerConfig(session_store=empty.url, session_store_password_file=str(tmp_path / "p"))
    assert describe_storage(config) == "stored in PostgreSQL, 127.0.0.1"
    with pytest.raises(ConfigurationError) as caught:
        ServerConfig(session_store=f"postgresql://a:{PASSWORD}@h/d")
    assert PASSWORD not in str(caught.value)
    with pytest.raises(ConfigurationError, match="cannot both be given"):
        ServerConfig(session_store=empty.url, session_dir=str(tmp_path))


def test_a_response_whose_server_dies_is_found_as_failed_by_another(
    empty: Postgres, tmp_path: Path
) -> None:
    """While it runs it is known to all, and not taken for one that was interrupted."""
    file = tmp_path / "password"
    file.write_text(PASSWORD)
    flags = ("--session-store", empty.url, "--session-store-password-file", str(file))
    model = model_folder("cottention")
    body = {"input": "x", "background": True, "temperature": 0, "max_output_tokens": 1_000_000}
    with (
        server(empty, tmp_path) as other,
        served(model, None, *flags, "--chat-template", "plain") as (popen, client),
    ):
        made = client.post("/v1/responses", json=body).json()
        path = f"/v1/responses/{made['id']}"
        eventually(lambda: client.get(path).json()["status"] == "in_progress")
        assert other.client.get(path).json()["status"] in ("queued", "in_progress")
        popen.kill()
        popen.wait()
        eventually(lambda: other.client.get(path).json().get("status"), equals="failed")
        assert "the server stopped" in other.client.get(path).json()["error"]["message"]

"""Sessions of keys with quotas at a live server with a real store."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from cottention.engine.engine import Engine
from cottention.server.config import ServerConfig
from cottention.server.limits.api_keys import load_api_keys, session_quotas
from cottention.server.sessions.storage import open_sessions
from tests.server.limits.test_api_keys import bearer
from tests.server.live import Live, serving
from tests.server.sessions.test_storage import KeepingEngine

KEYS = {"first": {"key": "key-of-one", "max_sessions": 3}, "second": {"key": "key-of-two"}}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder: Path = tmp_path_factory.mktemp("quotas")
    (folder / "keys.json").write_text(json.dumps(KEYS))
    settings = {
        "session_dir": str(folder / "sessions"),
        "api_key_file": str(folder / "keys.json"),
        "key_max_session_bytes": 100_000,
        "session_ttl_seconds": 3600.0,
    }
    config = ServerConfig(**settings)
    quotas = session_quotas(load_api_keys(config), config)
    engine = KeepingEngine()
    with contextlib.ExitStack() as stack:
        sessions = stack.enter_context(open_sessions(cast(Engine, engine), config, quotas))
        yield stack.enter_context(serving(engine, sessions=sessions, **settings))


def test_a_key_that_has_its_sessions_gets_no_more_and_another_does(live: Live) -> None:
    live.client.headers.update(bearer("key-of-one"))
    session_id = live.opened("abc")
    snapshot = live.client.get(f"/v1/sessions/{session_id}/snapshot").content
    forked = live.client.post(f"/v1/sessions/{session_id}/fork", json={"n": 2})
    assert forked.status_code == 200
    refused = [
        live.client.post("/v1/sessions", json={"prompt": "abc"}),
        live.client.post("/v1/sessions/import", content=snapshot),
        live.client.post(f"/v1/sessions/{session_id}/fork", json={}),
    ]
    for answer in refused:
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "session_quota_exceeded"
        assert "and 3 are allowed" in answer.json()["error"]["message"]
    assert live.complete(prompt="d", session_id=session_id, max_tokens=2).status_code == 200
    live.client.headers.update(bearer("key-of-two"))
    for _ in range(5):
        live.opened("abc")


def test_a_key_whose_sessions_fill_its_bytes(live: Live) -> None:
    live.client.headers.update(bearer("key-of-two"))
    session_id = live.opened("abc")
    fork = live.client.post(f"/v1/sessions/{session_id}/fork", json={"n": 1000})
    assert fork.status_code == 403
    assert "bytes of sessions, and 100000 are allowed" in fork.json()["error"]["message"]
    assert live.session(session_id)["position"] == 3


def test_sessions_have_a_lifetime_by_default(live: Live) -> None:
    live.client.headers.update(bearer("key-of-one"))
    [newest, *_] = live.client.get("/v1/sessions").json()["data"]
    assert 3500 < newest["expires_at"] - newest["created"] <= 3601

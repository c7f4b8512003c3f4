"""Sessions in a real folder behind a real server: what was answered is there after a restart."""

import contextlib
import errno
import os
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

from cottention.engine.engine import Engine
from cottention.engine.errors import ConfigurationError
from cottention.engine.sessions.fingerprint import Fingerprint
from cottention.engine.sessions.snapshot import SnapshotCodec
from cottention.engine.state.context_window import context_schedules
from cottention.engine.state.spec import StateSpec, recurrence_tensors
from cottention.server.config import ServerConfig
from cottention.server.sessions.storage import describe_storage, open_sessions
from tests.server.fake_engine import FakeEngine
from tests.server.live import Live, eventually, serving
from tests.server.sse import read_told

SPEC = StateSpec(recurrence_tensors(layers=1, heads=1, value_width=8, key_width=8))


TOLD = {"context_start": 0, "durable": True}


class KeepingEngine(FakeEngine):
    """A fake engine with a real codec; its states have no rows."""

    weights = "w"

    def session_codec(self) -> SnapshotCodec:
        prints = Fingerprint(self.weights, "t", "c", "l")
        return SnapshotCodec(prints, SPEC, 256, context_schedules(512), 512)


@contextlib.contextmanager
def keeping(folder: Path | None, weights: str = "w") -> Iterator[Live]:
    engine = KeepingEngine()
    engine.weights = weights
    config = ServerConfig(session_dir=None if folder is None else str(folder))
    with contextlib.ExitStack() as stack:
        sessions = stack.enter_context(open_sessions(cast(Engine, engine), config))
        yield stack.enter_context(serving(engine, sessions=sessions))


def snapshot(live: Live, session_id: str) -> bytes:
    return live.client.get(f"/v1/sessions/{session_id}/snapshot").content


def test_what_was_answered_is_there_after_a_restart(tmp_path: Path) -> None:
    with keeping(tmp_path) as live:
        session_id = live.opened("x", metadata={"name": "é"})
        live.complete(prompt="y", session_id=session_id, max_tokens=3)
        live.events(prompt="z", session_id=session_id, max_tokens=2)
        fork = live.client.post(f"/v1/sessions/{session_id}/fork", json={}).json()["data"][0]
        raw, before = snapshot(live, session_id), live.session(session_id)
        assert before["durable"] is True
        assert before["position"] == 8
    with keeping(tmp_path) as live:
        after = live.session(session_id)
        assert after == before | {"residence": after["residence"]}
        assert snapshot(live, session_id) == raw == snapshot(live, fork["id"])
        listed = live.client.get("/v1/sessions").json()["data"]
        assert {each["id"] for each in listed} == {session_id, fork["id"]}
        assert live.client.post(f"/v1/sessions/{session_id}/rewind").json()["position"] == 5
        answer = live.complete(prompt="", session_id=session_id, max_tokens=1).json()
        assert answer["session"] == {"id": session_id, "position": 6} | TOLD
        assert live.client.delete(f"/v1/sessions/{fork['id']}").status_code == 200


def test_a_session_moves_to_a_server_of_the_same_model(tmp_path: Path) -> None:
    with keeping(None) as here, keeping(tmp_path, weights="other") as there:
        raw = snapshot(here, here.opened("xyz"))
        made = here.client.post("/v1/sessions/import", content=raw).json()
        assert made["position"] == 3
        assert made["durable"] is False
        assert snapshot(here, made["id"]) == raw
        refused = there.client.post("/v1/sessions/import", content=raw)
        assert refused.status_code == 409
        assert "weights" in refused.json()["error"]["message"]
        damaged = here.client.post("/v1/sessions/import", content=raw[:-1])
        assert damaged.json()["error"]["code"] == "bad_snapshot"
        assert there.client.get("/v1/sessions").json()["data"] == []


def test_the_events_of_a_turn_survive_a_restart_and_do_not_move(tmp_path: Path) -> None:
    body = {"prompt": "y", "max_tokens": 9, "stream": True, "on_disconnect": "continue"}
    with keeping(tmp_path) as live:
        session_id = live.opened("x")
        said = live.client.post("/v1/completions", json=body | {"session_id": session_id}).text
        raw = snapshot(live, session_id)
    told = read_told(said)
    events = f"/v1/sessions/{session_id}/events"
    with keeping(tmp_path) as live, keeping(None) as there:
        assert live.client.get(events).text == said
        last = {"Last-Event-ID": told[0].id}
        assert read_told(live.client.get(events, headers=last).text) == told[1:]
        moved = there.client.post("/v1/sessions/import", content=raw).json()["id"]
        assert there.client.get(f"/v1/sessions/{moved}/events").status_code == 204
        assert snapshot(there, moved) == raw == snapshot(live, session_id)
        live.complete(prompt="z", session_id=session_id, max_tokens=1)
        assert live.client.get(events).status_code == 204
        assert live.client.get(events, headers=last).status_code == 410


def test_a_folder_of_another_model_says_what_differs(tmp_path: Path) -> None:
    with keeping(tmp_path) as live:
        session_id = live.opened("x")
    with keeping(tmp_path, weights="other") as live:
        refused = live.complete(prompt="y", session_id=session_id)
        assert refused.json()["error"]["code"] == "snapshot_mismatch"
        assert f"session '{session_id}' cannot go on here" in refused.json()["error"]["message"]
        assert "weights" in refused.json()["error"]["message"]


def test_a_damaged_state_says_whose_it_is_and_how_to_go_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with keeping(tmp_path) as live:
        session_id = live.opened("x")
        before = {path for path in tmp_path.rglob("*") if path.is_file()}
        live.complete(prompt="y", session_id=session_id, max_tokens=2)
    [newest] = {path for path in (tmp_path / "states").rglob("*") if path.is_file()} - before
    newest.write_bytes(newest.read_bytes()[:-1] + b"!")
    with keeping(tmp_path) as live:
        refused = live.complete(prompt="z", session_id=session_id)
        assert (refused.status_code, refused.json()["error"]["code"]) == (500, "session_damaged")
        assert f"session '{session_id}'" in refused.json()["error"]["message"]
        assert newest.name not in refused.text
        logged = [line for line in caplog.messages if newest.name in line]
        assert any(session_id in line for line in logged)
        rewind = f"/v1/sessions/{session_id}/rewind"
        assert f"POST {rewind}" in refused.json()["error"]["message"]
        assert live.client.post(rewind).status_code == 200
        assert live.complete(prompt="z", session_id=session_id).status_code == 200


def test_busy_moved_and_missing_are_told_alike(tmp_path: Path) -> None:
    with keeping(tmp_path) as live:
        session_id = live.opened("x")
        stale = {"If-Match": '"9"'}
        body = {"prompt": "y", "session_id": session_id}
        assert live.client.post("/v1/completions", json=body, headers=stale).status_code == 412
        assert live.client.post(f"/v1/sessions/{session_id}/rewind").status_code == 409
        assert live.complete(prompt="y", session_id="none").status_code == 404
        assert live.client.get("/v1/sessions?after=none").status_code == 404
        assert live.complete(prompt="fail", session_id=session_id).status_code == 500
        assert live.complete(**body, max_tokens=2).json()["session"]["position"] == 4
        capacity = live.client.get("/v1/capacity").json()
        assert [capacity[each] for each in ("resident", "parked", "stored")] == [0, 1, 0]
        assert capacity["stored_bytes"] > 0


def test_sessions_are_tended_while_the_server_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is past its time goes without being asked for, and a long turn's lease is renewed."""

    def lease_until() -> float:
        with contextlib.closing(sqlite3.connect(tmp_path / "index.sqlite")) as index:
            query = "SELECT lease_until FROM sessions WHERE lease_until IS NOT NULL"
            [[until]] = index.execute(query).fetchall()
        return float(until)

    monkeypatch.setattr("cottention.engine.sessions.manager.LEASE_SECONDS", 0.3)
    with keeping(tmp_path) as live:
        session_id = live.opened("x")
        live.engine.step_seconds = 0.02
        with ThreadPoolExecutor() as pool:
            body = {"prompt": "y", "session_id": session_id, "max_tokens": 2000}
            turn = pool.submit(lambda: live.complete(**body))
            live.opened("z", ttl_seconds=0.01)
            eventually(lambda: live.client.get("/v1/capacity").json()["parked"], equals=0)
            assert len(list((tmp_path / "states").glob("??/*"))) == 1
            for _ in range(3):
                before = lease_until()
                eventually(lambda before=before: lease_until() > before)
            live.engine.step_seconds = 0.0
            assert turn.result().json()["session"]["position"] == 2002


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    engine: Any = KeepingEngine()
    config = ServerConfig(session_dir=str(tmp_path))
    first, second = open_sessions(engine, config), open_sessions(engine, config)
    with first, pytest.raises(ConfigurationError), second:
        pass
    assert str(tmp_path) in describe_storage(config)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("file", "file cannot hold sessions: it is a file; give --session-dir a folder"),
        ("file/sessions", "sessions: a part of its path is a file; give --session-dir a folder"),
        ("forbidden", "sessions: writing there is not permitted; give --session-dir a folder"),
        ("lost", "sessions: read-only file system; give --session-dir a folder"),
        ("locked", "sessions: is a directory .*/locked/lock.; give --session-dir a folder"),
        ("", "--session-dir must name a folder; it is empty"),
    ],
)
def test_a_folder_that_cannot_be_is_told(
    path: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "locked" / "lock").mkdir(parents=True)
    made = Path.mkdir

    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        for name, number in (("forbidden", errno.EACCES), ("lost", errno.EROFS)):
            if self.name == name:
                raise OSError(number, os.strerror(number), str(self))
        made(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    config = ServerConfig(session_dir=str(tmp_path / path) if path else "")
    kept = open_sessions(cast(Engine, KeepingEngine()), config)
    with pytest.raises(ConfigurationError, match=says), kept:
        pass

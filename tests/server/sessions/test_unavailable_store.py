"""A store that is refused something: what clients see of it, and that no connection breaks."""

import logging
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
from pathlib import Path

import pytest

from cottention.engine.errors import SnapshotError
from tests.server.fake_sessions import READ_ONLY, FakeSessions
from tests.server.live import eventually, serving
from tests.server.process import served


def test_what_is_refused_before_work_begins_is_a_507() -> None:
    with serving(sessions=FakeSessions(fails={"open": READ_ONLY})) as live:
        answer = live.client.post("/v1/sessions", json={"prompt": "x"})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (507, "store_unavailable")
        assert "read-only" in error["message"]
        session_id = live.opened("x")
        live.sessions.fails["begin"] = READ_ONLY
        answer = live.complete(prompt="y", session_id=session_id, max_tokens=2)
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "store_unavailable")


@pytest.mark.parametrize(
    "error",
    [
        sqlite3.DatabaseError("database disk image is malformed"),
        SnapshotError("it is damaged"),
        OSError(5, "Input/output error"),
        MemoryError(),
        RuntimeError("a mistake"),
    ],
)
@pytest.mark.parametrize("on_disconnect", ["cancel", "continue"])
def test_a_commit_that_fails_in_a_stream_is_an_error_event(
    error: Exception, on_disconnect: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection that broke would leave the client without a reason."""
    with serving() as live:
        session_id = live.opened("x")
        live.sessions.fails["commit"] = error
        body = {"prompt": "y", "session_id": session_id, "max_tokens": 2, "stream": True}
        with caplog.at_level(logging.ERROR):
            answer = live.complete(**body, on_disconnect=on_disconnect)
        *_, last, end = answer.text.split("\n\n")
        assert end == ""
        assert "the turn could not be stored" in last
        assert "server_error" in last
        eventually(lambda: live.sessions.ends, equals=["abandon"])
        assert any(session_id in line for line in caplog.messages)
        assert live.text_of(session_id) == "x"
        again = live.complete(**body, on_conflict="wait")  # the place is left after the last event
        assert again.text.endswith("data: [DONE]\n\n")
        assert live.text_of(session_id) == "xyab"


@pytest.mark.slow
def test_a_server_without_descriptors_answers_turns(gptj_folder: Path, tmp_path: Path) -> None:
    """The kernel refuses every new file, for real; the client's connection is there already."""
    with served(gptj_folder, tmp_path, stderr=subprocess.PIPE) as (popen, client):
        session_id = client.post("/v1/sessions", json={"prompt": "def f(x):"}).json()["id"]
        body = {"prompt": "y", "session_id": session_id, "ignore_eos": True, "max_tokens": 3}
        assert client.post("/v1/completions", json=body).json()["session"]["durable"] is True
        before, hard = resource.prlimit(popen.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(popen.pid, resource.RLIMIT_NOFILE, (0, hard))
        for stream in (False, True, False):
            answer = client.post("/v1/completions", json=body | {"stream": stream})
            assert answer.status_code == 200
            assert '"durable":false' in answer.text.replace(" ", "")
            assert not stream or answer.text.endswith("data: [DONE]\n\n")
        answer = client.post("/v1/sessions", json={"prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "store_unavailable")
        resource.prlimit(popen.pid, resource.RLIMIT_NOFILE, (before, hard))
        assert client.post("/v1/completions", json=body).json()["session"]["durable"] is True
        popen.send_signal(signal.SIGTERM)
        assert popen.wait(60) == 0
        assert popen.stderr
        log = popen.stderr.read()
        reason = "the session folder does not take writes: Too many open files"
        assert (log.count(reason), log.count("Traceback")) == (1, 0)


@pytest.mark.slow
def test_a_server_whose_folder_is_removed_answers_turns(gptj_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sessions"
    with served(gptj_folder, folder, stderr=subprocess.PIPE) as (popen, client):
        session_id = client.post("/v1/sessions", json={"prompt": "def f(x):"}).json()["id"]
        shutil.rmtree(folder)
        body = {"prompt": "y", "session_id": session_id, "ignore_eos": True, "max_tokens": 3}
        for stream in (False, True):
            answer = client.post("/v1/completions", json=body | {"stream": stream})
            assert '"durable":false' in answer.text.replace(" ", "")
        assert client.post("/v1/sessions", json={"prompt": "x"}).status_code == 507
        assert client.post(f"/v1/sessions/{session_id}/fork", json={}).status_code == 507
        popen.send_signal(signal.SIGTERM)
        assert popen.wait(60) == 0
        assert popen.stderr
        log = popen.stderr.read()
        assert log.count("Traceback") == 0
        assert f"are lost, since they could not be stored: {session_id}" in log
        assert not os.path.exists(folder)

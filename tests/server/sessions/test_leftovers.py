"""Servers whose sessions end with them, killed and told to stop: what is left of them where."""

import signal
from pathlib import Path

import pytest

from cottention.server.sessions.storage import PREFIX
from tests.server.process import served

pytestmark = pytest.mark.slow


def test_what_a_killed_server_left_the_next_start_removes(
    gptj_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def folders() -> set[Path]:
        return {*tmp_path.glob(f"{PREFIX}*")}

    with served(gptj_folder, None) as (alive, client):
        living = folders()
        name = client.post("/v1/sessions", json={"prompt": "d"}).json()["id"]
        with served(gptj_folder, None) as (killed, _):
            assert len(folders()) == 2
            killed.kill()
            killed.wait(60)
        dead = folders() - living
        assert len(dead) == 1
        with served(gptj_folder, None) as (stopped, _):
            assert living < folders()
            assert not dead & folders()
            stopped.send_signal(signal.SIGTERM)
            assert stopped.wait(60) == 0
        assert folders() == living
        assert client.post(f"/v1/sessions/{name}/append", json={"prompt": "e"}).status_code == 200
        alive.send_signal(signal.SIGTERM)
        assert alive.wait(60) == 0
    assert not folders()

"""A server whose disk is full: the kernel refuses every byte more, for real."""

import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest

from tests.server.process import served

pytestmark = pytest.mark.slow


def test_what_a_stop_could_not_store_is_told_and_only_that_is_lost(
    gptj_folder: Path, tmp_path: Path
) -> None:
    with served(gptj_folder, tmp_path, stderr=subprocess.PIPE) as (popen, client):
        session_id = client.post("/v1/sessions", json={"prompt": "def f(x):"}).json()["id"]
        before = client.get(f"/v1/sessions/{session_id}").json()
        body = {"prompt": "y", "session_id": session_id, "ignore_eos": True, "max_tokens": 5000}
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            lines = answer.iter_lines()
            assert next(lines)
            resource.prlimit(popen.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            assert any('"durable":false' in line for line in lines)
        popen.send_signal(signal.SIGTERM)
        assert popen.wait(60) == 0
        assert popen.stderr
        [told] = [line for line in popen.stderr if " are lost, " in line]
        assert " ERROR the last turns of 1 session(s) are lost" in told
        assert f" {session_id} (the session folder does not take writes: disk I/O error)" in told
    with served(gptj_folder, tmp_path) as (_, client):
        after = client.get(f"/v1/sessions/{session_id}").json()
        assert (after["position"], after["durable"]) == (before["position"], True)


def test_turns_on_a_full_disk_are_rewound_one_by_one_or_not_and_a_stop_stores_them(
    gptj_folder: Path, small_disk: Path
) -> None:
    """The last try has the room that the index's log kept back for leases."""
    with served(gptj_folder, small_disk / "sessions") as (popen, client):
        session_id = client.post("/v1/sessions", json={"prompt": "d"}).json()["id"]
        url = f"/v1/sessions/{session_id}"
        rest = bytes(os.statvfs(small_disk).f_bavail * 4096)
        (small_disk / "rest").write_bytes(rest)
        body = {"prompt": "xy", "session_id": session_id, "ignore_eos": True, "max_tokens": 3}
        told = [client.post("/v1/completions", json=body).json()["session"] for _ in range(3)]
        assert not any(each["durable"] for each in told)
        before = client.get(url).json()
        assert (before["position"], before["checkpoints"]) == (told[-1]["position"], 0)
        refused = client.post(f"{url}/rewind")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "nothing_to_rewind")
        assert client.get(url).json() == before
        assert client.post("/v1/sessions", json={"prompt": "e"}).status_code == 507
        popen.send_signal(signal.SIGTERM)
        assert popen.wait(60) == 0
    with served(gptj_folder, small_disk / "sessions") as (_, client):
        after = client.get(url).json()
        assert (after["position"], after["durable"]) == (before["position"], True)


def test_a_key_that_fills_its_quota_leaves_another_the_room_of_its_own(
    gptj_folder: Path, small_disk: Path
) -> None:
    """Both quotas fit on the disk: neither key gets a 507, however often sessions are replaced."""
    keys = [{"authorization": f"Bearer key-of-{name}"} for name in ("one", "two")]
    flags = ("--api-key=key-of-one", "--api-key=key-of-two", f"--key-max-session-bytes={3 << 19}")
    metadata = {f"{place:02}": "x" * 500 for place in range(16)}
    with served(gptj_folder, small_disk / "sessions", *flags) as (_, client):

        def fill() -> list[str]:
            """Sessions until there is no more room; each has a turn."""
            made = []
            while True:
                answer = client.post("/v1/sessions", json={"prompt": "d", "metadata": metadata})
                if answer.status_code != 200:
                    break
                made.append(answer.json()["id"])
                body = {"prompt": "xy", "session_id": made[-1], "max_tokens": 2}
                told = client.post("/v1/completions", json=body)
                assert told.status_code in (200, 403), told.text
            assert answer.status_code == 403, answer.text
            return made

        client.headers.update(keys[0])
        for _ in range(4):
            for session_id in fill():
                assert client.delete(f"/v1/sessions/{session_id}").status_code == 200
        fill()
        client.headers.update(keys[1])
        assert len(fill()) > 10

"""A server whose disk is full when it stops: the kernel refuses every byte more, for real."""

import resource
import signal
import subprocess
from pathlib import Path

from tests.server.process import served


def test_what_a_stop_could_not_store_is_told_and_only_that_is_lost(
    gptj_folder: Path, tmp_path: Path
) -> None:
    with served(gptj_folder, tmp_path, stderr=subprocess.PIPE) as (popen, client):
        session_id = client.post("/v1/sessions", json={"prompt": "def f(x):"}).json()["id"]
        before = client.get(f"/v1/sessions/{session_id}").json()
        body = {"prompt": "y", "session_id": session_id, "ignore_eos": True, "max_tokens": 1000}
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
        assert f" {session_id} (the session folder's disk takes no more" in told
    with served(gptj_folder, tmp_path) as (_, client):
        after = client.get(f"/v1/sessions/{session_id}").json()
        assert (after["position"], after["durable"]) == (before["position"], True)

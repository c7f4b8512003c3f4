"""What one key asks for keeps no other out, on a real engine."""

import json
from pathlib import Path

from cottention.engine.config import EngineConfig
from cottention.engine.engine import Engine
from cottention.engine.scheduling.client import Client
from cottention.server.limits.api_keys import owner_id
from tests.server.limits.test_api_keys import bearer
from tests.server.live import eventually, serving


def test_a_request_that_holds_every_slot_keeps_no_other_key_out(
    gptj_folder: Path, tmp_path: Path
) -> None:
    """Not in the batch, whatever its priority, and not in the queue."""
    keys = {"hog": {"key": "one"}, "other": {"key": "two", "weight": 2}}
    (tmp_path / "keys").write_text(json.dumps(keys))
    engine = Engine(gptj_folder, EngineConfig(max_slots=4))
    settings = {"api_key_file": str(tmp_path / "keys"), "max_queued_requests": 4}
    with serving(engine, **settings) as live:
        live.client.headers.update(bearer("one"))
        endless = {"max_tokens": 1_000_000, "ignore_eos": True, "priority": -(2**60)}
        socks = [live.connect(prompt=[5], n=4, **endless)]
        eventually(lambda: engine.stats().num_running, equals=1)
        eventually(lambda: live.async_engine.admission_queue.num_requests, equals=0)
        socks.append(live.connect(prompt=[[5]] * 4, **endless))
        eventually(lambda: engine.stats().num_waiting, equals=4)
        assert live.complete(prompt=[5]).status_code == 429
        live.client.headers.update(bearer("two"))
        for _ in range(3):
            answer = live.complete(prompt=[7, 8], max_tokens=16, ignore_eos=True, priority=9)
            assert answer.json()["usage"]["completion_tokens"] == 16
        assert "cottention:num_preemptions_total" in live.client.get("/metrics").text
        assert engine.stats().num_preemptions
        for sock in socks:
            sock.close()


def test_every_way_to_the_engine_names_its_key(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(json.dumps({"a": {"key": "one", "weight": 3}}))
    with serving(api_key_file=str(tmp_path / "keys")) as live:
        live.client.headers.update(bearer("one"))
        session_id = live.opened("x")
        live.client.post(f"/v1/sessions/{session_id}/append", json={"prompt": "y"})
        for more in ({}, {"session_id": session_id}, {"stream": True}):
            assert live.complete(prompt="x", **more).status_code == 200
        assert [each.client for each in live.engine.seen] == [Client(owner_id("one"), 3)] * 5

"""SIGTERM of a real server under load: in time, with status 0, and no stream without its end.

COTTENTION_STOP_ROUNDS says how many times; CI takes a few, `make stops` fifty.
"""

import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.process import served

pytestmark = pytest.mark.slow

ROUNDS = int(os.environ.get("COTTENTION_STOP_ROUNDS", "2"))
DRAIN_SECONDS = 1.0
IS_MEASURED = ROUNDS >= 50
"""Fifty stops (`make stops`) measure a machine that is free; a few only find what hangs."""
MARGIN_SECONDS = 1.0 if IS_MEASURED else 60.0
MODULE = "cottention.server" if IS_MEASURED else "tests.server.patient_main"
NUM_STREAMS = 12
NUM_TURNS = 6
NUM_STALLED = 2


@dataclass
class Heard:
    """What a client has heard: events as they came, and how it ended."""

    chunks: list[Any] = field(default_factory=list)
    status: int | None = None
    is_done: bool = False
    has_begun: threading.Event = field(default_factory=threading.Event)

    @property
    def last_reason(self) -> str | None:
        choices = [chunk["choices"][0] for chunk in self.chunks if chunk.get("choices")]
        return choices[-1]["finish_reason"] if choices else None


def listen(client: httpx.Client, body: dict[str, Any], heard: Heard) -> None:
    """A stream to its end, or to where it is cut."""
    try:
        with client.stream("POST", "/v1/completions", json=body) as response:
            heard.status = response.status_code
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    heard.is_done = True
                elif line.startswith("data: "):
                    heard.chunks.append(json.loads(line[6:]))
                    heard.has_begun.set()
    except httpx.TransportError:
        pass
    finally:
        heard.has_begun.set()


def bodies(names: Sequence[str], chance: random.Random) -> list[dict[str, Any]]:
    """Endless streams, some of them turns, and short ones that end by themselves meanwhile."""
    endless = {"stream": True, "max_tokens": 1_000_000, "ignore_eos": True}
    made = [{"prompt": f"f{n}", **endless} for n in range(NUM_STREAMS)]
    for body in made[::3]:
        body["max_tokens"] = chance.randrange(200, 3000)
    return made + [{"prompt": "x", "session_id": name, **endless} for name in names]


def stall(client: httpx.Client) -> socket.socket:
    """A stream that nobody reads."""
    raw = json.dumps({"prompt": "x", "stream": True, "max_tokens": 1_000_000}).encode()
    sock = socket.create_connection((client.base_url.host, client.base_url.port or 80))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
    sock.sendall(head.encode() + raw)
    return sock


def stop_in_time(popen: "subprocess.Popen[str]") -> float:
    began = time.monotonic()
    popen.send_signal(signal.SIGTERM)
    assert popen.wait(90) == 0
    return time.monotonic() - began


@pytest.mark.timeout(60 * ROUNDS + 60)
def test_a_stop_is_in_time_and_cuts_no_stream(gptj_folder: Path, tmp_path: Path) -> None:
    chance, took, positions = random.Random(0), [], {}
    for _ in range(ROUNDS):
        flags = ["--drain-seconds", str(DRAIN_SECONDS), "--max-slots", "40"]
        with served(gptj_folder, tmp_path / "sessions", *flags, module=MODULE) as (popen, client):
            for name, position in positions.items():
                assert client.get(f"/v1/sessions/{name}").json()["position"] == position
            opened = [client.post("/v1/sessions", json={}).json()["id"] for _ in range(NUM_TURNS)]
            wanted = bodies(opened, chance)
            all_heard = [Heard() for _ in wanted]
            clients = httpx.Client(base_url=client.base_url, timeout=90, limits=httpx.Limits())
            threads = [
                threading.Thread(target=listen, args=(clients, body, heard))
                for body, heard in zip(wanted, all_heard, strict=True)
            ]
            for thread in threads:
                thread.start()
            stalled = [stall(client) for _ in range(NUM_STALLED)]
            assert all(heard.has_begun.wait(90) for heard in all_heard)
            time.sleep(chance.uniform(0, 0.5))
            took.append(stop_in_time(popen))
            for thread in threads:
                thread.join()
            for sock in stalled:
                sock.close()
            clients.close()
        positions = check_ends(opened, all_heard)
    told = ", ".join(f"{each:.2f}" for each in sorted(took, reverse=True)[:5])
    print(f"{len(took)} stops of {DRAIN_SECONDS} s to drain, the longest after {told} s")
    assert max(took) <= DRAIN_SECONDS + MARGIN_SECONDS


def check_ends(opened: Sequence[str], all_heard: Sequence[Heard]) -> dict[str, int]:
    """Every stream has its end; the positions that the ends of turns told."""
    told = {}
    for place, heard in enumerate(all_heard):
        assert heard.status == 200
        assert heard.is_done, f"stream {place} was cut after {len(heard.chunks)} events"
        assert heard.last_reason in ("abort", "length")
    for name, heard in zip(opened, all_heard[-len(opened) :], strict=True):
        assert heard.last_reason == "abort"
        told[name] = heard.chunks[-1]["session"]["position"]
        assert told[name] > 0
    return told

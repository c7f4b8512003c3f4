"""HTTP around the real engine with a small random model: many streams, some of which leave."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cottention.engine.config import EngineConfig
from cottention.engine.engine import Engine
from cottention.engine.outputs import FinishReason
from cottention.engine.sampling_params import SamplingParams
from tests.server.live import Live, eventually, serving

NUM_CLIENTS = 64
NUM_TOKENS = 80


@pytest.fixture(scope="module")
def live(gptj_folder: Path) -> Iterator[Live]:
    """A server of the real engine, whose pool is full with all clients of a test."""
    with serving(Engine(gptj_folder, EngineConfig(max_slots=NUM_CLIENTS))) as live:
        yield live


@pytest.fixture(scope="module")
def solo(gptj_folder: Path) -> Engine:
    """The same model, for one request at a time."""
    return Engine(gptj_folder, EngineConfig(max_slots=1))


def request(client: int) -> dict[str, Any]:
    """What a client asks for; each something else."""
    return {
        "prompt": f"def f{client}(" * (1 + client % 5),
        "max_tokens": NUM_TOKENS,
        "temperature": 0.0 if client % 4 == 0 else 1.0,
        "seed": client,
        "ignore_eos": True,
    }


def expected(solo: Engine, body: dict[str, Any]) -> str:
    params = {name: value for name, value in body.items() if name != "prompt"}
    (completion,) = solo.generate([body["prompt"]], SamplingParams(**params))
    return completion.text


def read_stream(sock: socket.socket) -> tuple[str, str]:
    """Text and finish reason of a stream read by hand to its end."""
    received = b""
    while b"[DONE]" not in received:
        received += sock.recv(1 << 16)
    chunks = [
        json.loads(line[6:])["choices"][0]
        for line in received.split(b"\n")
        if line.startswith(b"data: {")
    ]
    return "".join(chunk["text"] for chunk in chunks), chunks[-1]["finish_reason"]


def test_a_whole_answer_is_the_library_s(live: Live, solo: Engine) -> None:
    answer = live.complete(**request(1)).json()
    assert answer["model"] == "cottention-gptj"
    assert answer["choices"][0]["text"] == expected(solo, request(1))
    assert answer["usage"]["completion_tokens"] == NUM_TOKENS


def test_64_streams_of_which_a_third_leaves(live: Live, solo: Engine) -> None:
    leaving = range(0, NUM_CLIENTS, 3)
    wanted = {client: request(client) for client in range(NUM_CLIENTS)}
    for client in leaving:
        wanted[client]["max_tokens"] = 1_000_000
    socks = [live.connect(**body, stream=True) for body in wanted.values()]
    for sock in socks[::3]:
        sock.recv(10)
        sock.close()
    for client, sock in enumerate(socks):
        if client % 3:
            with sock:
                assert read_stream(sock) == (expected(solo, request(client)), "length")
    eventually(lambda: live.engine.stats().num_free_slots, equals=NUM_CLIENTS)
    stats = live.engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_finished[FinishReason.ABORT] == len(leaving)


def test_what_the_real_engine_refuses_names_the_field(live: Live) -> None:
    top = live.engine.tokenizer.num_ids
    for body, param in (
        ({"prompt": [top]}, "prompt"),
        ({"prompt": "x", "n": NUM_CLIENTS + 1}, "n"),
        ({"prompt": "x", "max_tokens": 10**9}, "max_tokens"),
    ):
        response = live.complete(**body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param

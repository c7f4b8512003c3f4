"""Clients that read slowly, not at all, or are gone without a word; what they cost is bounded."""

import contextlib
import http.client
import json
import socket
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.server.config import ServerConfig
from cottention.server.sessions.storage import open_sessions
from tests.server.live import Live, eventually, serving

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
TCP_REPAIR = 19


def paused(live: Live) -> bool:
    return any(each.is_paused for each in [*live.engine.running.values()])


def read_to_the_end(sock: socket.socket) -> list[Any]:
    """The chunks of a stream's events."""
    response = http.client.HTTPResponse(sock)
    response.begin()
    received = response.read()
    assert b"[DONE]" in received[-100:], f"the stream ended after {received[-1000:]!r}"
    lines = [line[6:] for line in received.split(b"\n") if line.startswith(b"data: {")]
    return [json.loads(line) for line in lines]


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def test_a_stream_pauses_until_its_client_reads_again() -> None:
    """All the text comes, what had waited in one event, and what waited was bounded."""
    num_tokens = 1000
    with serving(stream_buffer_bytes=100_000) as live:
        live.step_with_loop()
        with live.connect(prompt="loud", stream=True, max_tokens=num_tokens) as sock:
            eventually(lambda: paused(live))
            generated = live.engine.num_generated
            time.sleep(0.2)
            assert live.engine.num_generated == generated < num_tokens
            (stream,) = live.async_engine.streams
            assert stream._num_unread_bytes < 2 * 100_000
            assert live.complete(prompt="x", max_tokens=500).status_code == 200
            chunks = read_to_the_end(sock)
        assert text_of(chunks) == "".join(ALPHABET[n % 26] * 10_000 for n in range(num_tokens))
        assert max(len(text_of([chunk])) for chunk in chunks) >= 100_000
        eventually(lambda: not live.engine.running)


def test_log_probabilities_count_towards_the_buffer() -> None:
    with serving(stream_buffer_bytes=50_000) as live:
        live.step_with_loop()
        body = {"prompt": "x", "stream": True, "max_tokens": 100_000, "logprobs": 20}
        with live.connect(**body):
            eventually(lambda: paused(live))
            (stream,) = live.async_engine.streams
            assert len(stream._unread[0].text) < 50


def test_each_prompt_of_a_request_pauses() -> None:
    with serving(stream_buffer_bytes=10_000) as live:
        with live.connect(prompt=["loud"] * 3, stream=True, max_tokens=300) as sock:
            eventually(lambda: all(r.is_paused for r in [*live.engine.running.values()]))
            chunks = read_to_the_end(sock)
        told = dict.fromkeys(range(3), 0)
        for chunk in chunks:
            told[chunk["choices"][0]["index"]] += len(chunk["choices"][0]["text"])
        assert set(told.values()) == {300 * 10_000}


def test_a_response_that_is_not_streamed_never_pauses() -> None:
    with serving(stream_buffer_bytes=10_000) as live:
        answer = live.complete(prompt="loud", max_tokens=50)
        assert len(answer.json()["choices"][0]["text"]) == 500_000


def test_a_paused_stream_times_out() -> None:
    with serving(stream_buffer_bytes=10_000) as live:
        body = {"prompt": "loud", "stream": True, "max_tokens": 100_000, "timeout": 2.0}
        with live.connect(**body) as sock:
            eventually(lambda: not live.engine.running)
            assert read_to_the_end(sock)[-1]["choices"][0]["finish_reason"] == "timeout"


def test_a_paused_stream_releases_its_slot_and_its_text_is_unchanged(gptj_folder: Path) -> None:
    """The engine's own: one slot for two, of which the first does not read."""
    engine = Engine(gptj_folder, EngineConfig(max_slots=1))
    body: dict[str, Any] = {"prompt": "abc", "max_tokens": 2000, "seed": 1, "ignore_eos": True}
    with serving(engine, stream_buffer_bytes=2000) as live:
        live.step_with_loop()
        with live.connect(**body, stream=True, return_token_ids=True) as sock:
            eventually(lambda: engine.stats().num_paused, equals=1)
            assert engine.stats().num_free_slots == 1
            answer = live.complete(prompt="abc", max_tokens=20, seed=1, ignore_eos=True)
            chunks = read_to_the_end(sock)
        ids = [i for chunk in chunks for i in chunk["choices"][0].get("token_ids") or ()]
        eventually(lambda: engine.stats().num_free_slots, equals=1)
    alone = Engine(gptj_folder, EngineConfig(max_slots=1))
    params = SamplingParams(**{key: value for key, value in body.items() if key != "prompt"})
    (expected,) = alone.generate(["abc"], params)
    assert tuple(ids) == expected.token_ids
    assert expected.text.startswith(answer.json()["choices"][0]["text"].rstrip("\ufffd"))


@pytest.mark.slow
def test_paused_states_are_bounded(gptj_folder: Path) -> None:
    """Of six the two that came last wait; the others keep what had come, and nobody else waits."""
    engine = Engine(gptj_folder, EngineConfig(max_slots=2, max_paused_states=2))
    body: dict[str, Any] = {"prompt": "abc", "max_tokens": 300, "seed": 1, "ignore_eos": True}
    body |= {"logprobs": 20}
    num_held = []
    with serving(engine, stream_buffer_bytes=2000) as live, contextlib.ExitStack() as open_ones:
        streams = []
        live.step_with_loop()
        for number in range(1, 7):
            streams.append(open_ones.enter_context(live.connect(**body, stream=True)))
            eventually(lambda: num_ended(live) + engine.stats().num_paused, equals=number)
            num_held.append(engine.stats().num_paused_states)
        expected = live.complete(**body).json()["choices"][0]["text"]
        assert num_held == [1, 2, 2, 2, 2, 2]
        assert num_ended(live) == 4
        capacity = live.client.get("/v1/capacity").json()
        assert (capacity["paused_states"], capacity["max_paused_states"]) == (2, 2)
        assert capacity["free_slots"] == 2
        assert (
            'num_states_paused{model_name="cottention-gptj"} 2.0'
            in live.client.get("/metrics").text
        )
        told = [read_to_the_end(sock) for sock in streams]
    reasons = [chunks[-1]["choices"][0]["finish_reason"] for chunks in told]
    assert reasons == ["slow_reader"] * 4 + ["length"] * 2
    for chunks, reason in zip(told, reasons, strict=True):
        text = text_of(chunks)
        assert text == expected if reason == "length" else expected.startswith(text) and text
    eventually(lambda: not engine.stats().num_paused_states)


def num_ended(live: Live) -> int:
    num: int = live.engine.stats().num_finished["slow_reader"]
    return num


def test_a_session_keeps_what_was_generated_before_its_pause(
    gptj_folder: Path, tmp_path: Path
) -> None:
    engine = Engine(gptj_folder, EngineConfig(max_slots=1, max_paused_states=0))
    settings = ServerConfig(session_dir=str(tmp_path))
    body: dict[str, Any] = {"max_tokens": 300, "seed": 1, "ignore_eos": True, "logprobs": 20}
    with (
        open_sessions(engine, settings) as sessions,
        serving(engine, sessions=sessions, stream_buffer_bytes=2000) as live,
    ):
        live.step_with_loop()
        session_id = live.opened("abc")
        turn = body | {"session_id": session_id, "prompt": "d", "return_token_ids": True}
        with live.connect(**turn, stream=True) as sock:
            eventually(lambda: num_ended(live))
            chunks = read_to_the_end(sock)
        ids = [i for chunk in chunks for i in chunk["choices"][0]["token_ids"]]
        last = chunks[-1]
        assert last["choices"][0]["finish_reason"] == "slow_reader"
        assert 0 < len(ids) < 300
        position = live.session(session_id)["position"]
        assert position == last["session"]["position"]
        num_before = position - len(engine.tokenizer.encode("abc")) - 1
        assert len(ids) - 4 <= num_before <= len(ids)  # the last may be half a character
        assert live.complete(session_id=session_id, prompt="e", max_tokens=2).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_reset_connection_frees_its_slot_in_one_step(stream: bool) -> None:
    with serving() as live:
        live.engine.step_seconds = 0.01
        sock = live.connect(prompt="x", max_tokens=1_000_000, stream=stream)
        eventually(lambda: live.engine.num_generated > 5)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        eventually(lambda: not live.engine.running)
        (cancelled,) = live.engine.cancelled
        assert cancelled.ended_at - cancelled.asked_at <= 1


def test_keep_alive_comments_detect_a_vanished_client() -> None:
    """Its socket vanishes as in a crash: the next comment finds nobody there."""
    with serving(sse_keep_alive_seconds=0.05) as live:
        live.engine.may_step.clear()
        sock = live.connect(prompt="x", max_tokens=1_000_000, stream=True)
        eventually(lambda: live.engine.running)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        except PermissionError:
            pytest.skip("only root can make a socket vanish")
        finally:
            sock.close()
        eventually(lambda: not live.async_engine.streams)
        live.engine.may_step.set()
        eventually(lambda: not live.engine.running)


def test_tcp_keep_alive_is_on_for_connections(shared: Live) -> None:
    host, port = shared.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60):
        connections = shared.server.server_state.connections
        eventually(lambda: connections)
        inherited = [each.transport.get_extra_info("socket") for each in connections]
        for sock in inherited:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 300_000

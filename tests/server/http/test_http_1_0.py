"""HTTP/1.0, which old proxies speak: streams without chunked coding, ended by their connection."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.generation.test_slow_clients import ALPHABET
from tests.server.live import Live, eventually
from tests.server.sse import read_told, text_of


@pytest.fixture
def slow(shared: Live) -> Iterator[Live]:
    """A server whose streams last."""
    shared.engine.step_seconds = 0.01
    yield shared
    shared.engine.step_seconds = 0.0


def ask(
    live: Live, path: str, body: Any = None, *, method: str = "POST", header: str = "X: y"
) -> socket.socket:
    """A request of HTTP/1.0 by hand, its answer unread."""
    host, port = live.url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=60)
    raw = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: {len(raw)}\r\n"
    sock.sendall(f"{head}{header}\r\n\r\n".encode() + raw)
    return sock


def answer(sock: socket.socket) -> tuple[list[str], str]:
    """Lines of the head, and the body: all that comes until the server closes."""
    with sock, sock.makefile("rb") as file:
        head, _, body = file.read().partition(b"\r\n\r\n")
    return head.decode().lower().split("\r\n"), body.decode()


def check_plain(head: list[str]) -> None:
    assert head[0].endswith(" 200 ok")
    assert "connection: close" in head
    assert not [line for line in head if line.startswith(("transfer-encoding", "content-length"))]


@pytest.mark.parametrize("num_tokens", [1, 300])
def test_a_stream_is_events_and_nothing_else(shared: Live, num_tokens: int) -> None:
    body = {"prompt": "x", "max_tokens": num_tokens, "stream": True}
    head, text = answer(ask(shared, "/v1/completions", body))
    check_plain(head)
    *told, last = read_told(text)
    assert last.data == "[DONE]"
    assert text_of(told) == (ALPHABET * 12)[:num_tokens]


def test_an_interim_response_stays_apart_from_the_answer(shared: Live) -> None:
    """Its head must not get into the one of the answer that follows it."""
    body = {"prompt": "x", "max_tokens": 3, "stream": True}
    interim, rest = answer(ask(shared, "/v1/completions", body, header="Expect: 100-continue"))
    assert interim == ["http/1.1 100 continue"]
    head, _, text = rest.partition("\r\n\r\n")
    check_plain(head.lower().split("\r\n"))
    assert text_of(read_told(text)) == "abc"


def test_the_events_of_a_turn_that_goes_on(slow: Live) -> None:
    session_id = slow.opened("a")
    body = {"session_id": session_id, "prompt": "b", "max_tokens": 50, "stream": True}
    turn = ask(slow, "/v1/completions", body | {"on_disconnect": "continue"})
    eventually(lambda: slow.turns._live)
    head, text = answer(ask(slow, f"/v1/sessions/{session_id}/events", method="GET"))
    check_plain(head)
    assert text == answer(turn)[1]
    assert len(text_of(read_told(text))) == 50


def test_a_whole_answer_has_its_length(shared: Live) -> None:
    head, text = answer(ask(shared, "/v1/completions", {"prompt": "x", "max_tokens": 5}))
    assert f"content-length: {len(text)}" in head
    assert len(json.loads(text)["choices"][0]["text"]) == 5
    head, text = answer(ask(shared, "/v1/completions", {"prompt": 5.5}))
    assert head[0].endswith(" 400 bad request")
    assert f"content-length: {len(text)}" in head


def test_events_come_as_they_are_told_and_whoever_leaves_frees_its_slot(slow: Live) -> None:
    with ask(slow, "/v1/completions", {"prompt": "x", "max_tokens": 10**6, "stream": True}) as sock:
        received = b""
        while received.count(b"data: ") < 3:
            received += sock.recv(1 << 16)
        assert received.partition(b"\r\n\r\n")[2].startswith(b"data: {")
        assert slow.engine.running
    eventually(lambda: not slow.engine.running)

"""Slow, oversized and malformed requests over sockets: right statuses, bounded time and memory.

After each the server serves others as before, and a stream that ran meanwhile is complete.
"""

import contextlib
import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cottention.server.generation.chat_template import TimeLimitExceeded, find_template, time_limit
from cottention.server.http.body import Pace
from cottention.server.http.protocol import MAX_HEAD_BYTES, MAX_PIPELINED
from tests.server.generation.test_slow_clients import ALPHABET, read_to_the_end, text_of
from tests.server.live import Live, eventually, serving

MAX_GROWTH = 64 * 1024**2
"""Bytes that the process may grow by while it is attacked."""

POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


within_a_second = pytest.mark.parametrize("receive_seconds", [1.0], ids=[""])


@pytest.fixture
def receive_seconds() -> float:
    """More than a busy machine makes an honest client wait, but for tests that choose less."""
    return 60.0


@pytest.fixture
def live(receive_seconds: float) -> Iterator[Live]:
    """A server with another client's stream running; both are as they should be at the end."""
    process = psutil.Process()
    with serving(
        receive_seconds=receive_seconds, receive_rate=10_000, max_body_bytes=100_000
    ) as live:
        live.engine.step_seconds = 0.005
        before = process.memory_info().rss
        with live.connect(prompt="x", stream=True, max_tokens=400) as other:
            yield live
            live.engine.step_seconds = 0.0
            assert text_of(read_to_the_end(other)) == (ALPHABET * 16)[:400]
        assert process.memory_info().rss - before < MAX_GROWTH
        assert live.complete(prompt="x").status_code == 200
        eventually(lambda: not live.engine.running)
        live.client.close()
        eventually(lambda: not live.server.server_state.connections)


@contextlib.contextmanager
def connection(live: Live) -> Iterator[socket.socket]:
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        yield sock


def answer(sock: socket.socket) -> bytes:
    """All that comes until the server closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(1 << 16):
            received += chunk
    return received


def error_of(received: bytes, status: int) -> str:
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), received[:200]
    message: str = json.loads(body)["error"]["message"]
    return message


@within_a_second
def test_a_head_that_takes_its_time(live: Live) -> None:
    with connection(live) as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for byte in (POST * 100)[:60]:
            sock.send(bytes([byte]))
            time.sleep(0.02)
        assert "took longer" in error_of(answer(sock), 408)


@within_a_second
def test_a_connection_that_says_nothing(live: Live) -> None:
    with connection(live) as sock:
        assert answer(sock) == b""


@within_a_second
def test_a_second_head_that_takes_its_time(live: Live) -> None:
    with connection(live) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        received = b""
        while b"alive" not in received:
            received += sock.recv(1000)
        sock.sendall(b"GET /hea")
        assert "took longer" in error_of(answer(sock), 408)


@within_a_second
def test_a_body_that_takes_its_time(live: Live) -> None:
    with connection(live) as sock, contextlib.suppress(BrokenPipeError):
        sock.sendall(POST + b"Content-Length: 1000\r\n\r\n{")
        for _ in range(60):
            sock.send(b" ")
            time.sleep(0.02)
        assert "too slowly" in error_of(answer(sock), 408)


@pytest.mark.parametrize("is_announced", [True, False])
@pytest.mark.parametrize("path", [b"/v1/completions", b"/v1/sessions/import", b"/tokenize"])
def test_a_body_that_comes_quickly_and_then_stalls(path: bytes, is_announced: bool) -> None:
    """What has come earns it no time, and neither does what is still to come."""
    length = b"Content-Length: 300000" if is_announced else b"Transfer-Encoding: chunked"
    begin = b" " * 200_000
    with serving(receive_seconds=1.0) as live, connection(live) as sock:
        sock.sendall(b"POST %b HTTP/1.1\r\nHost: x\r\n%b\r\n\r\n" % (path, length))
        sock.sendall(begin if is_announced else b"%x\r\n%b\r\n" % (len(begin), begin))
        assert "may not pause for 1 s" in error_of(answer(sock), 408)


def test_how_slowly_a_body_may_come() -> None:
    pace = Pace(seconds=30, bytes_per_second=1000)
    assert pace.deadline(began=100, now=100, num_bytes=0) == 130
    assert pace.deadline(began=100, now=120, num_bytes=5000) == 135
    assert pace.deadline(began=100, now=120, num_bytes=1_000_000) == 150


@within_a_second
def test_a_body_that_is_slow_and_steady_is_read(live: Live) -> None:
    """Slower than a second a piece of its size would be allowed, but never stalling."""
    body = json.dumps({"prompt": "x" * 20_000, "max_tokens": 1}).encode()
    with connection(live) as sock:
        sock.sendall(POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body))
        for place in range(0, len(body), 2500):
            sock.sendall(body[place : place + 2500])
            time.sleep(0.16)
        assert answer(sock).startswith(b"HTTP/1.1 200 ")


def test_ten_thousand_headers(live: Live) -> None:
    with connection(live) as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(POST)
        sock.sendall(b"".join(b"X-%d: y\r\n" % n for n in range(10_000)) + b"\r\n")
        assert "128 header lines" in error_of(answer(sock), 431)


@pytest.mark.parametrize("begin", [b"GET /", POST + b"X: ", POST + b"X"])
def test_a_head_that_never_ends(live: Live, begin: bytes) -> None:
    with connection(live) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(begin)
            for _ in range(10 * MAX_HEAD_BYTES // 1000):
                sock.sendall(b"y" * 1000)
        received = answer(sock)
        if received:  # a client that goes on sending may lose the answer with the connection
            error_of(received, 431)


CLOSE = b"GET /health HTTP/1.1\r\nConnection: close\r\n"


@pytest.mark.parametrize("excess", [0, 1])
@pytest.mark.parametrize("before", [b"", b"\r\n" * 1000, CLOSE.replace(b"close", b"x") + b"\r\n"])
def test_how_long_a_head_may_be_to_the_byte(live: Live, excess: int, before: bytes) -> None:
    """Whatever came before it, and however the network cuts it."""
    length = MAX_HEAD_BYTES + excess - len(CLOSE + b"X: \r\n\r\n")
    with connection(live) as sock:
        sock.sendall(before + CLOSE + b"X: " + b"y" * length + b"\r\n\r\n")
        received = answer(sock)
    last = received[received.rindex(b"HTTP/1.1 ") :]
    if excess:
        assert "65536 bytes" in error_of(last, 431)
    else:
        assert last.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("length", [65_600, 70_000, 100_000])
def test_an_address_that_is_longer_than_a_head_may_be(live: Live, length: int) -> None:
    with connection(live) as sock:
        sock.sendall(b"GET /" + b"y" * length + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        assert "65536 bytes" in error_of(answer(sock), 431)


def test_a_head_is_not_charged_with_what_framed_the_body_before_it(live: Live) -> None:
    framed = b"1;%b\r\n \r\n" % (b"y" * 15_000) * 4 + b"2\r\n{}\r\n0\r\n\r\n"
    with connection(live) as sock:
        sock.sendall(CHUNKED + framed + CLOSE + b"X: " + b"y" * 50_000 + b"\r\n\r\n")
        received = answer(sock)
    assert received.startswith(b"HTTP/1.1 400 ")  # an empty object
    assert received.endswith(b'{"status":"alive"}')


CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
FRAMES = {
    "trailer": (CHUNKED + b"2\r\n{}\r\n0\r\nX: ", b"y" * 1000),
    "trailer of a GET": (
        b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ",
        b"y" * 1000,
    ),
    "chunk extension": (CHUNKED + b"2;", b"y" * 1000),
    "chunks of a byte": (CHUNKED, b"1\r\n{\r\n" * 200),
    "empty lines": (b"\r\n", b"\r\n" * 500),
}


@pytest.mark.parametrize("name", FRAMES)
def test_what_frames_a_body_and_never_ends(live: Live, name: str) -> None:
    """It is no part of a body that could be too long, and was kept until it ends."""
    begin, more = FRAMES[name]
    with connection(live) as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(begin)
        for _ in range(100 * MAX_HEAD_BYTES // len(more)):
            sock.sendall(more)
        pytest.fail("all of it was taken")


def test_a_long_body_in_small_chunks_is_read(live: Live) -> None:
    body = json.dumps({"prompt": "x" * 90_000, "max_tokens": 1}).encode()
    pieces = [body[start : start + 6] for start in range(0, len(body), 6)]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    with connection(live) as sock:
        head = POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        sock.sendall(head + framed + b"0\r\nX: a trailer\r\n\r\n")
        assert answer(sock).startswith(b"HTTP/1.1 200 ")


def flood(sock: socket.socket) -> None:
    """Send pieces of a body until the server has had enough."""
    while True:
        sock.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
        time.sleep(0.001)


def test_a_body_that_never_ends_is_not_read_for_ever(live: Live) -> None:
    """Also where an endpoint wants no body, and where its answer came long ago."""
    for head in (POST, b"GET /health HTTP/1.1\r\nHost: x\r\n"):
        with connection(live) as sock:
            sock.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                flood(sock)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /\x00 HTTP/1.1\r\n\r\n",
        POST + b"X: a\x00b\r\n\r\n",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=repr,
)
def test_what_is_no_http(live: Live, raw: bytes) -> None:
    with connection(live) as sock:
        sock.sendall(raw)
        assert error_of(answer(sock), 400)


def test_garbage_behind_a_request(live: Live) -> None:
    with connection(live) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n\x00garbage\r\n\r\n")
        assert answer(sock).startswith(b"HTTP/1.1 400 ")


def test_garbage_behind_a_stream_that_runs(live: Live) -> None:
    """The stream is cut, and no second answer is put into the middle of it."""
    with live.connect(prompt="x", stream=True, max_tokens=1_000_000) as sock:
        eventually(lambda: len(live.engine.running), equals=2)
        first = sock.recv(200)
        sock.sendall(b"\x00garbage\r\n\r\n")
        received = first + answer(sock)
    assert received.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1 400" not in received
    eventually(lambda: len(live.engine.running) <= 1)


def test_a_thousand_requests_at_once_in_one_connection(live: Live) -> None:
    with connection(live) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
        received = b""
        while received.count(b"alive") < 1000:
            received += sock.recv(1 << 16)


def test_more_requests_at_once_than_anybody_needs(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "cottention")
    with connection(live) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 20 * MAX_PIPELINED)
        assert answer(sock).count(b"alive") <= MAX_PIPELINED
    assert f"at most {MAX_PIPELINED} requests may be pipelined" in caplog.text


@pytest.mark.parametrize("stream", [True, False])
def test_one_that_leaves_with_a_request_waiting_behind_its_first(
    live: Live, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    body = json.dumps({"prompt": "x", "stream": stream, "max_tokens": 1_000_000}).encode()
    with connection(live) as sock:
        sock.sendall((POST + b"Content-Length: %d\r\n\r\n" % len(body) + body) * 2)
        eventually(lambda: len(live.engine.running), equals=2)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    eventually(lambda: len(live.engine.running) <= 1)
    assert "Exception" not in caplog.text


@pytest.mark.parametrize("offer", [b"h2c", b"websocket"])
def test_an_offer_of_another_protocol_is_declined_and_the_request_answered(
    live: Live, offer: bytes
) -> None:
    """As Java's client makes it with each first request; and nothing is lost behind it."""
    body = json.dumps({"prompt": "x", "max_tokens": 3}).encode()
    head = POST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %b\r\n" % offer
    with connection(live) as sock:
        first = head + b"HTTP2-Settings: AAEAAEAAAA\r\nContent-Length: %d\r\n\r\n" % len(body)
        sock.sendall(first + body[:5])
        time.sleep(0.05)
        sock.sendall(body[5:] + b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
        received = answer(sock)
    assert received.startswith(b"HTTP/1.1 200 ")
    assert b'"text":"abc"' in received
    assert received.endswith(b'{"status":"alive"}')


BODIES = {
    "deep": b'{"prompt": ' + b"[" * 49_000 + b"]" * 49_000 + b"}",
    "deep objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "long number": b'{"prompt": "x", "max_tokens": ' + b"9" * 90_000 + b"}",
    "large exponent": b'{"prompt": "x", "temperature": 1e99999999}',
    "many names": b"{" + b",".join(b'"a%d":1' % n for n in range(9_000)) + b"}",
    "NUL": b'{"prompt": "a\x00b"}',
    "half a character": b'{"prompt": "\xc3"}',
    "many ids": b'{"prompt": [' + b"-1," * 30_000 + b"0]}",
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_made_to_hurt(live: Live, name: str) -> None:
    response = live.client.post("/v1/completions", content=BODIES[name])
    assert response.status_code == 400, response.text
    assert len(response.text) < 1000


def test_an_escaped_nul_is_a_character_like_others(live: Live) -> None:
    raw = b'{"prompt": "a\\u0000b", "echo": true, "max_tokens": 1}'
    response = live.client.post("/v1/completions", content=raw)
    assert response.json()["choices"][0]["text"] == "a\x00ba"


def test_a_template_that_loops_is_ended_and_others_are_served(tmp_path: Path) -> None:
    """It says nothing while it loops, and the number of rounds is the client's."""
    endless = "{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(endless)
    with serving(template=find_template(None, tmp_path)) as live:
        chat = b'{"messages":[{"role":"user","content":"x"}],"chat_template_kwargs":{"n":99999}}'
        with connection(live) as sock:
            sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nConnection: close\r\n")
            sock.sendall(b"Host: x\r\nContent-Length: %d\r\n\r\n" % len(chat) + chat)
            assert live.complete(prompt="x").status_code == 200
            assert "more than" in error_of(answer(sock), 400)


def test_a_time_limit_interrupts_once_and_not_after_the_end() -> None:
    def loop() -> None:
        with time_limit(0.05):
            while True:
                with contextlib.suppress(Exception):
                    pass

    with pytest.raises(TimeLimitExceeded):
        loop()
    for _ in range(50):
        with time_limit(10):
            pass
    with contextlib.suppress(TimeLimitExceeded), time_limit(0.02):
        pass
    time.sleep(0.05)

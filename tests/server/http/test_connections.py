"""Connections beyond what there may be: idle ones make room, busy ones stay, newcomers are told."""

import contextlib
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cottention.engine.errors import ConfigurationError
from cottention.server.cli.open_files import RESERVED_FILES, connection_table
from cottention.server.config import ServerConfig
from cottention.server.http.connections import network_of
from tests.server.generation.test_slow_clients import read_to_the_end, text_of
from tests.server.http.test_hostile import answer, error_of
from tests.server.live import Live, eventually, serving
from tests.server.process import served

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def connect(url: str, source: str = "127.0.0.1") -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), 60, source_address=(source, 0))


def asked(sock: socket.socket) -> bytes:
    """The answer of /health over a connection that stays open."""
    sock.sendall(GET)
    received = b""
    while not received.endswith(b'{"status":"alive"}'):
        chunk = sock.recv(1000)
        assert chunk, received
        received += chunk
    return received


def num_connections(live: Live) -> int:
    return len(live.server.server_state.connections)


@contextlib.contextmanager
def streams(live: Live, num: int) -> Iterator[list[socket.socket]]:
    """Running streams that do not end, each over a connection of its own."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(live.connect(prompt="x", stream=True, max_tokens=1_000_000))
            for _ in range(num)
        ]


@pytest.mark.parametrize("sends", [b"", b"GET /health HT", GET], ids=["nothing", "half", "whole"])
def test_a_newcomer_has_the_place_of_the_one_that_was_idle_longest(sends: bytes) -> None:
    settings = {"max_connections": 10, "max_connections_per_address": 10}
    with serving(**settings) as live, contextlib.ExitStack() as stack:
        idle = []
        for _ in range(30):
            idle.append(stack.enter_context(connect(live.url)))
            if sends == GET:
                asked(idle[-1])
            else:
                idle[-1].sendall(sends)
            asked(stack.enter_context(connect(live.url)))
        eventually(lambda: num_connections(live) <= 10)
        assert answer(idle[0]) == b""
        if sends != b"GET /health HT":
            asked(idle[-1])


def test_running_requests_keep_their_connections_and_who_finds_all_busy_is_told() -> None:
    with serving(max_connections=4, max_connections_per_address=5) as live:
        live.engine.step_seconds = 0.001
        with connect(live.url) as idle, streams(live, 3) as running:
            eventually(lambda: len(live.engine.running), equals=3)
            live.engine.may_step.clear()
            with live.connect(prompt="x", stream=True, max_tokens=300) as last:
                assert answer(idle) == b""
                eventually(lambda: len(live.engine.running), equals=4)
                with connect(live.url) as newcomer:
                    received = answer(newcomer)
                assert "all 4 connections" in error_of(received, 503)
                assert b"\r\nretry-after: 5\r\n" in received
                live.engine.may_step.set()
                assert len(text_of(read_to_the_end(last))) == 300
            with connect(live.url) as newcomer:
                asked(newcomer)
            assert all(sock.recv(1) for sock in running)


def test_one_address_has_a_part_of_all_connections() -> None:
    """Its idle ones go first; others are served and keep theirs."""
    settings = {"max_connections": 6, "max_connections_per_address": 3}
    with serving(**settings) as live, connect(live.url, "127.0.0.2") as other, streams(live, 2):
        eventually(lambda: len(live.engine.running), equals=2)
        asked(other)
        with connect(live.url) as idle, streams(live, 1) as [last]:
            assert answer(idle) == b""
            eventually(lambda: len(live.engine.running), equals=3)
            with connect(live.url) as newcomer:
                assert "--max-connections-per-address" in error_of(answer(newcomer), 429)
            asked(other)
            with connect(live.url, "127.0.0.3") as third:
                asked(third)
            assert last.recv(1)


def test_who_holds_the_most_idle_connections_loses_the_first() -> None:
    settings = {"max_connections": 8, "max_connections_per_address": 7}
    with serving(**settings) as live, contextlib.ExitStack() as stack:
        kept = stack.enter_context(connect(live.url, "127.0.0.2"))
        asked(kept)
        for _ in range(30):
            stack.enter_context(connect(live.url, "127.0.0.3"))
            asked(stack.enter_context(connect(live.url, "127.0.0.4")))
        asked(kept)


def test_one_that_stops_reading_has_so_long_and_no_longer() -> None:
    """Also where it acknowledges what comes, as the system does for it, and reads a little."""
    with serving(send_seconds=0.3, stream_buffer_bytes=20_000) as live:
        with live.connect(prompt="loud", stream=True, max_tokens=1_000_000) as sock:
            eventually(lambda: live.engine.running)
            while live.engine.running:
                sock.recv(10)
                live.complete(prompt="x", max_tokens=1)
        assert live.complete(prompt="x").status_code == 200


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_what_is_one_address(host: str, network: str) -> None:
    assert network_of(host) == network


def test_connections_and_the_servers_own_files_are_within_the_limit_of_open_files() -> None:
    assert connection_table(ServerConfig(), 1_000_000).max_connections == 1024
    small = connection_table(ServerConfig(max_session_reads=5), RESERVED_FILES + 25)
    assert (small.max_connections, small.max_per_address) == (20, 10)
    for settings, limit in (({"max_connections": 900}, 1024), ({}, RESERVED_FILES)):
        with pytest.raises(ConfigurationError, match="ulimit -n"):
            connection_table(ServerConfig(**settings), limit)


def test_the_soft_limit_of_open_files_is_raised_at_the_start() -> None:
    code = (
        "import logging, resource;"
        "from cottention.server.cli.open_files import raise_open_files_limit;"
        "logging.basicConfig(level='INFO');"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (200, 900));"
        "assert raise_open_files_limit() == raise_open_files_limit() == 900;"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (900, 900)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("raised the limit of open files from 200 to 900") == 1


@pytest.mark.slow
def test_a_thousand_idle_connections_leave_descriptors_to_newcomers_and_the_store(
    gptj_folder: Path, tmp_path: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] < 2000:
        pytest.skip("needs 2,000 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 2000), limits[1]))
    with served(gptj_folder, tmp_path, max_files=(180, 200)) as (_, client):
        url = str(client.base_url).rstrip("/")
        with contextlib.ExitStack() as stack:
            for n in range(1000):
                sock = stack.enter_context(connect(url))
                if n % 2:
                    sock.sendall(GET)
                if n % 50 == 0:
                    with connect(url) as newcomer:
                        asked(newcomer)
                    created = client.post("/v1/sessions", json={"prompt": "def"})
                    assert created.status_code == 200, created.text
                    assert created.json()["durable"]
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)

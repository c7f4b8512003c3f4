"""Real signals to a real process: what drains, what is refused, what is cut, with which status."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cottention.engine.errors import ConfigurationError
from cottention.server.cli.serve import bind_socket, page_url, url_of
from cottention.server.cli.unix_socket import unix_socket
from tests.server.live import eventually

ROOT = Path(__file__).parents[3]
CLOSING = 60.0
"""Seconds after which a server hangs, on a machine that does other things as well."""


class Process:
    """A server in a process of its own."""

    def __init__(self, popen: "subprocess.Popen[str]", client: httpx.Client) -> None:
        self._popen = popen
        self.client = client

    def signal(self, number: int = signal.SIGTERM) -> None:
        self._popen.send_signal(number)

    def wait(self, seconds: float) -> int:
        return self._popen.wait(seconds)

    def printed(self) -> str:
        """What it has printed since it was ready, once it has ended."""
        assert self._popen.stdout
        return self._popen.stdout.read()

    @contextlib.contextmanager
    def stream(self, max_tokens: int, prompt: str = "x") -> Iterator[Iterator[str]]:
        """The lines of a stream whose first event has come."""
        body = {"prompt": prompt, "stream": True, "max_tokens": max_tokens}
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert '"text":"a' in next(lines)
            yield lines

    def is_draining(self) -> bool:
        return self.client.get("/ready").status_code == 503


@contextlib.contextmanager
def process(step_seconds: float, drain_seconds: float) -> Iterator[Process]:
    """A running server, killed at the end if it is still there."""
    command = [sys.executable, "-m", "tests.server.fake_main", str(step_seconds)]
    with subprocess.Popen(
        [*command, str(drain_seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as popen:
        assert popen.stdout
        url = popen.stdout.readline().strip()
        try:
            assert url.startswith("http://"), url + popen.stdout.read()
            with httpx.Client(base_url=url, timeout=CLOSING) as client:
                yield Process(popen, client)
        finally:
            popen.kill()


def test_sigterm_lets_streams_finish_and_refuses_new_work() -> None:
    with process(0.1, 600) as server, server.stream(max_tokens=600) as lines:
        server.signal()
        eventually(server.is_draining)
        refused = server.client.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        assert server.client.get("/health").status_code == 200
        server.signal(signal.SIGUSR1)
        rest = list(lines)
        assert rest[-2] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-4]
        assert server.wait(CLOSING) == 0


def test_streams_beyond_the_drain_time_end_with_a_final_event() -> None:
    with process(0.01, 0.5) as server, server.stream(max_tokens=1_000_000) as lines:
        started = time.monotonic()
        server.signal()
        rest = list(lines)
        assert rest[-2] == "data: [DONE]"
        assert '"finish_reason":"abort"' in rest[-4]
        assert server.wait(CLOSING) == 0
        assert time.monotonic() - started > 0.4


def test_a_stalled_client_does_not_delay_the_stop() -> None:
    with process(0.0, 0.2) as server, server.stream(max_tokens=1_000_000):
        time.sleep(0.5)
        server.signal()
        assert server.wait(CLOSING) == 0


def test_a_second_signal_stops_at_once() -> None:
    with process(0.01, 60) as server, server.stream(max_tokens=1_000_000) as lines:
        server.signal(signal.SIGINT)
        eventually(server.is_draining)
        server.signal(signal.SIGTERM)
        assert server.wait(CLOSING) == 128 + signal.SIGTERM
        assert '"finish_reason":"abort"' in list(lines)[-4]
        assert "Traceback" not in server.printed()


def test_an_idle_server_stops_at_once() -> None:
    with process(0.0, 60) as server:
        assert server.client.get("/ready").status_code == 200
        server.signal()
        assert server.wait(CLOSING) == 0


def test_threads_let_each_other_run_often() -> None:
    """A body that is parsed beside the engine would else keep it waiting 5 ms time and again."""
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('interval', sys.getswitchinterval()))\n"
        "runpy.run_module('tests.server.fake_main', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "0", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as popen:
        assert popen.stdout
        assert popen.stdout.readline().startswith("http://")
        popen.terminate()
        assert float(popen.stdout.read().split()[-1]) < 0.001


def test_a_dead_engine_ends_the_process_with_a_status() -> None:
    with process(0.0, 60) as server:
        assert server.client.post("/v1/completions", json={"prompt": "die"}).status_code == 500
        assert server.client.get("/health").status_code == 503
        assert server.wait(CLOSING) == 1


@pytest.mark.parametrize(
    ("host", "port", "says"),
    [
        ("127.0.0.1", None, "choose another"),
        ("no-such-host.invalid", 8000, r"is not an address of this machine: \w.* give --host"),
        ("192.0.2.1", 8000, "cannot listen on 192.0.2.1:8000"),
    ],
)
def test_an_address_that_cannot_be_bound_is_one_line(
    host: str, port: int | None, says: str
) -> None:
    with bind_socket("127.0.0.1", 0) as taken:
        port = port or taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=says):
            bind_socket(host, port)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_an_ipv6_address_is_bracketed() -> None:
    with bind_socket("::1", 0) as sock:
        assert url_of(sock).startswith("http://[::1]:")


def test_the_page_is_named_by_an_address_that_a_browser_of_this_machine_can_open(
    tmp_path: Path,
) -> None:
    with bind_socket("0.0.0.0", 0) as sock:
        port = sock.getsockname()[1]
        assert page_url(sock) == f"http://127.0.0.1:{port}/"
        assert page_url(sock, has_tls=True) == f"https://127.0.0.1:{port}/"
    with unix_socket(str(tmp_path / "socket"), 1) as sock:
        assert page_url(sock) is None

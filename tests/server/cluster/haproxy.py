"""A real HAProxy with docker/haproxy/haproxy.cfg, and the name server that tells it its servers.

Servers have addresses of their own on this machine and one port, as containers have.
"""

import re
import shutil
import socket
import socketserver
import struct
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.ports import free_port
from tests.server.live import PATIENCE, eventually

START = 240.0
"""Seconds after which several servers that start at once, on such a machine, will not."""

CHECK_TIMEOUT = "15s"
"""Or HAProxy takes servers for dead that only wait for the processor."""

CONFIGURATION = Path(__file__).parents[3] / "docker" / "haproxy" / "haproxy.cfg"

A_RECORD, SRV_RECORD, INTERNET = 1, 33, 1
ANSWER_FLAGS, NAME_OF_QUESTION = 0x8180, 0xC00C
SERVICE = "_http._tcp.replica"
"""Begins the name of SRV records."""


class NameServer(socketserver.UDPServer):
    """Tells `addresses`: all of them under any name, or the n-th under a name that begins pod-N.

    SRV records name the pods, as Kubernetes does, each on `service_port`.
    """

    def __init__(self, addresses: list[str], service_port: int) -> None:
        super().__init__(("127.0.0.1", 0), Question)
        self.addresses = addresses
        self.service_port = service_port

    @property
    def port(self) -> int:
        port: int = self.server_address[1]
        return port

    def records(self, name: str, kind: int) -> list[bytes]:
        """The data of the records that answer a question."""
        if kind == SRV_RECORD:
            return [
                struct.pack("!HHH", 0, 33, self.service_port) + b"\5pod-%d\7replica\0" % n
                for n in range(len(self.addresses))
            ]
        if kind != A_RECORD:
            return []
        place = re.match(r"pod-(\d)", name)
        return [
            socket.inet_aton(address)
            for n, address in enumerate(self.addresses)
            if place is None or int(place[1]) == n
        ]


class Question(socketserver.DatagramRequestHandler):
    """One message. RFC 1035, section 4."""

    server: NameServer

    def handle(self) -> None:
        query = self.rfile.read()
        end = query.index(0, 12) + 5  # of the name, the type and the class
        [kind] = struct.unpack("!H", query[end - 4 : end - 2])
        found = self.server.records(query[13 : end - 5].decode("latin-1"), kind)
        records = b"".join(
            struct.pack("!HHHIH", NAME_OF_QUESTION, kind, INTERNET, 1, len(data)) + data
            for data in found
        )
        head = struct.pack("!HHHHH", ANSWER_FLAGS, 1, len(found), 0, 0)
        self.wfile.write(query[:2] + head + query[12:end] + records)


@dataclass
class Balancer:
    """A running HAProxy. names: its servers' addresses, which may change."""

    process: "subprocess.Popen[bytes]"
    names: NameServer
    port: int
    metrics_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def metrics(self) -> str:
        return httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=PATIENCE).text

    def states(self, backend: str) -> Counter[str]:
        """How many of a backend's servers are UP, DOWN, NOLB or in MAINT (not used)."""
        pattern = rf'haproxy_server_status{{proxy="{backend}",server="[^"]+",state="(\w+)"}} 1'
        return Counter(re.findall(pattern, self.metrics()))

    def num_answers(self, backend: str) -> Counter[str]:
        """How many answers each of a backend's servers has given, by the names of its places."""
        name = "haproxy_server_http_responses_total"
        pattern = rf'{name}{{proxy="{backend}",server="([^"]+)",[^}}]*}} (\d+)'
        counted: Counter[str] = Counter()
        for name, number in re.findall(pattern, self.metrics()):
            counted[name] += int(number)
        return counted

    def wait_for(self, num: int) -> None:
        """Return when all backends have so many servers."""
        for backend in ("sessions", "grouped", "anywhere"):
            eventually(lambda name=backend: self.states(name)["UP"], equals=num, seconds=START)


@contextmanager
def running_haproxy(
    addresses: list[str], port: int, *, by_service: bool = False
) -> Iterator[Balancer]:
    """In front of servers on `port` of these addresses; skips where there is none.

    by_service: their names come of SRV records.
    """
    program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if program is None:
        pytest.skip("HAProxy is not installed: apt-get install haproxy")
    listen, metrics = free_port(), free_port()
    with NameServer(addresses, port) as names, tempfile.TemporaryFile() as log:
        threading.Thread(target=names.serve_forever, args=(0.05,), daemon=True).start()
        environment = {
            "REPLICAS": SERVICE if by_service else f"replica:{port}",
            "DNS_SERVER": f"127.0.0.1:{names.port}",
            "LISTEN": f"127.0.0.1:{listen}",
            "CHECK_TIMEOUT": CHECK_TIMEOUT,
            "METRICS_LISTEN": f"127.0.0.1:{metrics}",
        }
        process = subprocess.Popen(
            [program, "-db", "-f", CONFIGURATION], env=environment, stdout=log, stderr=log
        )
        try:
            eventually(lambda: _listens(metrics) or process.poll() is not None)
            log.seek(0)
            assert process.poll() is None, log.read().decode()
            yield Balancer(process, names, listen, metrics)
        finally:
            process.kill()
            process.wait()
            names.shutdown()


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0

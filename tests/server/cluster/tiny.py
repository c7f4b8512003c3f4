"""Small HTTP servers that say which of them answered: where thousands of requests are counted."""

import json
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class TinyServer(ThreadingHTTPServer):
    """Answers everything with its address. Streams wait for each event to be put into `events`.

    status: of /ready. closes: the connection after each answer.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: str, port: int) -> None:
        super().__init__((address, port), Handler)
        self.address = address
        self.status = 200
        self.closes = False
        self.events: queue.Queue[bytes] = queue.Queue()
        self.num_streams = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """HAProxy closes the connections of its checks without a word."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: TinyServer

    def do_GET(self) -> None:
        status = self.server.status if self.path.startswith("/ready") else 200
        self._answer(status, {"server": self.server.address, "path": self.path})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        if b'"stream"' in raw:
            self._stream()
        else:
            self._answer(200, {"server": self.server.address})

    def _answer(self, status: int, body: object) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(raw)))
        if self.server.closes:
            self.send_header("connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(raw)

    def _stream(self) -> None:
        self.server.num_streams += 1
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        while event := self.server.events.get():
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def tiny_servers(addresses: Sequence[str], port: int) -> Iterator[list[TinyServer]]:
    """Servers on `port` of each address."""
    with ExitStack() as stack:
        servers = []
        for address in addresses:
            server = stack.enter_context(TinyServer(address, port))
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            stack.callback(server.shutdown)
            servers.append(server)
        yield servers

"""A proxy on this machine that fails in the ways a network does, at a chosen moment."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Literal

Fault = Literal["lose request", "lose answer", "swallow"]
"""Of the next message with the trigger: close the connection before it is forwarded, or after it is
and before its answer is; or forward nothing more and say nothing."""


class TcpProxy:
    """Forwards to a port. `arm` makes one connection fail; the others go on."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        self._armed: tuple[bytes, Fault] | None = None
        self.num_faults = 0
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def arm(self, trigger: bytes, fault: Fault) -> None:
        """Fail at the next message that holds these bytes."""
        with self._lock:
            self._armed = trigger, fault

    def close(self) -> None:
        self._listener.close()
        for sock in self._sockets:
            _end(sock)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            self._sockets += [client, server]
            fault: list[Fault] = []
            for run, pair in ((self._up, (client, server)), (self._down, (server, client))):
                threading.Thread(target=run, args=(*pair, fault), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket, fault: list[Fault]) -> None:
        with contextlib.suppress(OSError):
            while message := client.recv(1 << 16):
                with self._lock:
                    if self._armed and self._armed[0] in message:
                        fault.append(self._armed[1])
                        self._armed = None
                        self.num_faults += 1
                if fault[:1] == ["lose request"]:
                    break
                if fault[:1] != ["swallow"]:
                    server.sendall(message)
        _end(client)
        _end(server)

    def _down(self, server: socket.socket, client: socket.socket, fault: list[Fault]) -> None:
        with contextlib.suppress(OSError):
            while message := server.recv(1 << 16):
                if fault[:1] == ["lose answer"]:
                    break
                if fault[:1] != ["swallow"]:
                    client.sendall(message)
        _end(client)
        _end(server)


def _end(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


@contextlib.contextmanager
def proxied(target: int) -> Iterator[TcpProxy]:
    proxy = TcpProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()

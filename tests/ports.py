"""Ports for servers that are given one."""

import random
import socket
from contextlib import suppress
from pathlib import Path


def free_port() -> int:
    """Of those that the system gives to no connection by itself while the server starts."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(10_000, first)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port

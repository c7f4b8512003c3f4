"""The open connections: how many there may be, in all and of one address.

Where there is no room for a new one, one that waits for a request is closed for it: of the address
that has most of these, the one that has waited longest. A new connection is refused only where all
others have requests. Everything here runs on the event loop.
"""

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Protocol

from cottention.server.http.errors import RETRY_AFTER_SECONDS, ApiError, too_many, unavailable

IPV6_PREFIX = 64
"""Bits of an IPv6 address that count: networks assign the others freely."""


class Connection(Protocol):
    """What the table asks of a connection."""

    def close_idle(self) -> bool:
        """Close it unless an answer is still on its way to the client; whether it was closed."""
        ...


@dataclass(slots=True)
class _Address:
    """The connections of one address. idle: those without a request, longest first."""

    num: int = 0
    idle: OrderedDict[Connection, None] = field(default_factory=OrderedDict)


class ConnectionTable:
    """Counts connections, and closes idle ones where others need their place."""

    def __init__(self, max_connections: int, max_per_address: int) -> None:
        self.max_connections = max_connections
        self.max_per_address = max_per_address
        self._addresses: dict[str, _Address] = {}
        self._address_of: dict[Connection, str] = {}

    def __len__(self) -> int:
        """Number of open connections."""
        return len(self._address_of)

    def make_room(self, address: str) -> None:
        """Have a place for a connection of this address. ApiError: 429 or 503, there is none."""
        own = self._addresses.get(address)
        if own is not None and own.num >= self.max_per_address and not self._close_one(own):
            raise too_many(
                f"this address has {own.num} connections, all with requests, and may have no more;"
                " use fewer at once, or have --max-connections-per-address raised",
                RETRY_AFTER_SECONDS,
                "too_many_connections",
            )
        if len(self) < self.max_connections:
            return
        by_idle = sorted(self._addresses.values(), key=lambda each: len(each.idle), reverse=True)
        if not any(self._close_one(each) for each in by_idle if each.idle):
            message = f"all {len(self)} connections that the server may have are busy; retry later"
            raise unavailable(message)

    def add(self, connection: Connection, address: str) -> None:
        """Count a connection, which has no request yet."""
        entry = self._addresses.setdefault(address, _Address())
        entry.num += 1
        entry.idle[connection] = None
        self._address_of[connection] = address

    def remove(self, connection: Connection) -> None:
        """The opposite of `add`. Idempotent."""
        address = self._address_of.pop(connection, None)
        if address is None:
            return
        entry = self._addresses[address]
        entry.idle.pop(connection, None)
        entry.num -= 1
        if not entry.num:
            del self._addresses[address]

    def set_idle(self, connection: Connection, *, is_idle: bool) -> None:
        """Note whether a connection waits for a request; nothing happens where it is closed."""
        address = self._address_of.get(connection)
        if address is None:
            return
        idle = self._addresses[address].idle
        if is_idle:
            idle.setdefault(connection)
        else:
            idle.pop(connection, None)

    def close_idle(self) -> None:
        """Close all connections without a request, as a server does that stops."""
        for entry in [*self._addresses.values()]:
            while self._close_one(entry):
                pass

    def _close_one(self, entry: _Address) -> bool:
        """Close the connection that has been idle longest; whether there was one."""
        for connection in entry.idle:
            if connection.close_idle():
                self.remove(connection)
                return True
        return False


def network_of(host: str) -> str:
    """What counts as one address: an IPv4 address, or the network of an IPv6 address."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, IPV6_PREFIX), strict=False))


def refusal(error: ApiError) -> bytes:
    """An error as a whole HTTP/1.1 answer that ends its connection."""
    head = [b"HTTP/1.1 %d %b" % (error.status, error.phrase.encode()), b"connection: close"]
    for name, value in (error.headers or {}).items():
        head.append(f"{name.lower()}: {value}".encode())
    body = error.body.encode()
    head += [b"content-type: application/json", b"content-length: %d" % len(body)]
    return b"\r\n".join(head) + b"\r\n\r\n" + body

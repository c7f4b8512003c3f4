"""Who gets to the port, and whether that is as it should be: told at start-up.

Owns the words. Knows no endpoint, and does not check keys.
"""

import ipaddress
import logging
import socket

from cottention.server.settings import ServerConfig

logger = logging.getLogger("cottention")


def warn_of_strangers(sock: socket.socket, config: ServerConfig) -> None:
    """Whoever reaches the port may use the server: said unless there is a key, or it is meant."""
    if config.without_key == "warn" and not (_is_private(sock) or _has_keys(config)):
        logger.warning(
            "%s is open to others and there is no --api-key: whoever reaches this port may use the"
            " model; --without-key allow says that they may",
            _host(sock),
        )


def who_reaches(sock: socket.socket, config: ServerConfig) -> str:
    """For a person, at start-up."""
    keys = "an API key is asked for" if _has_keys(config) else "no API key is asked for"
    if not _is_private(sock):
        return f"open to whoever gets to this port; {keys}"
    opens = "--host 0.0.0.0 opens it"
    return f"this machine alone; {keys}; {opens}" + (
        "" if _has_keys(config) else ", --api-key-file FILE sets keys"
    )


def _is_private(sock: socket.socket) -> bool:
    return ipaddress.ip_address(_host(sock)).is_loopback


def _host(sock: socket.socket) -> str:
    host: str = sock.getsockname()[0]
    return host.partition("%")[0]


def _has_keys(config: ServerConfig) -> bool:
    return bool(config.api_key or config.api_key_file)

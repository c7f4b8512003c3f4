"""From a bound socket to an exit status: what signals and a dead engine do to a running server.

Owns the drain: the first SIGTERM or SIGINT refuses new work and lets what runs finish, the second
stops now. Knows uvicorn, and nothing of endpoints.

Who gets to the port, and whether that is as it should be: told at start-up.

Owns the words. Knows no endpoint, and does not check keys.
"""

import asyncio
import contextlib
import gc
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any, cast

import uvicorn
from fastapi import FastAPI

from cottention.engine.errors import ConfigurationError
from cottention.server.config import ServerConfig
from cottention.server.generation.async_engine import AsyncEngine
from cottention.server.http.protocol import BoundedProtocol

logger = logging.getLogger("cottention")

FINAL_EVENT_SECONDS = 0.7
"""How long cancelled streams have to send their last event."""

FAILURE_SECONDS = 1.0
"""How long a server whose engine died still answers /health with 503."""

IDLE_CONNECTION_SECONDS = 75
"""Longer than clients keep theirs, so that none sends a request into a connection being closed."""

BACKLOG = 2048

UNREAD_SECONDS = 300
"""How long a client may take nothing of what is sent to it before its connection is given up."""

CONNECTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNREAD_SECONDS),
    (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 64 * 1024),
)
"""What each connection inherits: the system asks idle clients whether they are there, and holds
little of what is not sent, so that a slow reader is noticed here."""


def bind_socket(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigurationError saying what to change."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, OverflowError) as error:
        raise ConfigurationError(f"--host {host} --port {port} is no address: {error}") from None
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for level, option, value in CONNECTIONS:
        sock.setsockopt(level, option, value)
    try:
        sock.bind(address)
        sock.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        sock.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(
            f"cannot listen on {host}:{port}: {reason}; choose another with --host and --port"
        ) from None
    return sock


def url_of(sock: socket.socket) -> str:
    """Where a socket listens, as a browser takes it."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def bounded(receive_seconds: float) -> type[asyncio.Protocol]:
    """The protocol of each connection, as uvicorn makes it."""
    made: Any = partial(BoundedProtocol, receive_seconds=receive_seconds)
    return cast("type[asyncio.Protocol]", made)


def run_server(
    app: FastAPI,
    bridge: AsyncEngine,
    config: ServerConfig,
    sock: socket.socket,
    announce: Callable[[], None],
) -> int:
    """Serve until told to stop; the exit status. `announce` is called when requests are taken."""
    settings = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        ws="none",
        http=bounded(config.receive_seconds),
        server_header=False,
        timeout_keep_alive=IDLE_CONNECTION_SECONDS,
        timeout_graceful_shutdown=FINAL_EVENT_SECONDS,  # type: ignore[arg-type]  # takes parts, too
        backlog=BACKLOG,
    )
    server = DrainingServer(settings, bridge, config.drain_seconds, announce)
    gc.freeze()  # what is loaded lives until the end: looking through it stops all streams
    try:
        server.run(sockets=[sock])
    finally:
        bridge.stop()
    return server.exit_status


class DrainingServer(uvicorn.Server):
    """uvicorn that goes on listening while it drains, so that a newcomer hears 503, not silence."""

    def __init__(
        self,
        config: uvicorn.Config,
        bridge: AsyncEngine,
        drain_seconds: float,
        announce: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self.exit_status = 0
        self._draining = False
        self._bridge = bridge
        self._drain_seconds = drain_seconds
        self._announce = announce
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's, which closes the door at once and ends by the signal."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for each in signals:
            loop.add_signal_handler(each, self._on_signal, each)
        try:
            yield
        finally:
            for each in signals:
                loop.remove_signal_handler(each)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, watch the engine, and say so."""
        await super().startup(sockets)
        self._spawn(self._exit_when_engine_fails())
        self._announce()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_signal(self, number: int) -> None:
        if self._draining:
            self._stop_now(number)
        else:
            self._draining = True
            self._spawn(self._drain())

    def _stop_now(self, number: int) -> None:
        self.exit_status = 128 + number
        self._bridge.cancel_all()
        self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        logger.info("stopping: what runs has %g s to end", self._drain_seconds)
        self._bridge.drain()
        try:
            async with asyncio.timeout(self._drain_seconds):
                await self._bridge.wait_idle()
        except TimeoutError:
            self._bridge.cancel_all()
        self.should_exit = True

    async def _exit_when_engine_fails(self) -> None:
        await self._bridge.failed.wait()
        self.exit_status = 1
        await asyncio.sleep(FAILURE_SECONDS)
        self.should_exit = True


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

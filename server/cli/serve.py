"""Running the HTTP server: its socket, who can connect, and how it shuts down.

The first SIGTERM or SIGINT stops new requests and waits for running ones; a second ends them.
"""

import asyncio
import contextlib
import gc
import ipaddress
import logging
import math
import signal
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, cast

import uvicorn
from fastapi import FastAPI

from cottention.engine.errors import ConfigurationError
from cottention.server.api.dependencies import Context
from cottention.server.cli.unix_socket import unix_socket
from cottention.server.config import SEND_SECONDS, ServerConfig
from cottention.server.generation.async_engine import AsyncEngine
from cottention.server.http.connections import ConnectionTable
from cottention.server.http.listener import BoundedServer
from cottention.server.http.protocol import BoundedProtocol

logger = logging.getLogger("cottention")

FINAL_EVENT_SECONDS = 0.7
"""Time for cancelled streams to send their last event."""

NOTICE_SECONDS = 3.0
"""At least so long a server that shares its sessions answers 503 before it stops listening.

Its load balancer asks every second whether it takes requests. A request that it sent on a
connection which is just being closed would be answered by nobody.
"""

FAILURE_SECONDS = 1.0
"""Time during which a server whose engine has failed still answers /health with 503."""

IDLE_CONNECTION_SECONDS = 75
"""Longer than clients keep idle connections, so that they close them first."""

BACKLOG = 2048

SWITCH_SECONDS = 0.0002
"""How long a thread keeps the interpreter while others wait for it.

The engine's thread gives it up many times in a step, and each time would wait for Python's default
of 5 ms where a long body is parsed beside it.
"""

CONNECTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 64 * 1024),
)
"""Options that connections inherit: idle clients are probed, and little unsent data is buffered in
the kernel, so that a slow reader is noticed here."""


@contextlib.contextmanager
def listening(config: ServerConfig) -> Iterator[socket.socket]:
    """The listening socket of these settings. Raises ConfigurationError."""
    made = (
        bind_socket(config.host, config.port, config.send_seconds)
        if config.uds is None
        else unix_socket(config.uds, BACKLOG)
    )
    with made as sock:
        yield sock


def bind_socket(host: str, port: int, send_seconds: float = SEND_SECONDS) -> socket.socket:
    """Open a listening socket. Raises ConfigurationError.

    send_seconds: time after which a connection is closed whose client acknowledges nothing.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(
            f"--host {host} --port {port} is not an address of this machine: {reason}; give --host"
            " an IP address or a name of this machine, such as 127.0.0.1, or 0.0.0.0 for all of its"
            " IPv4 addresses"
        ) from None
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for level, option, value in CONNECTIONS:
        sock.setsockopt(level, option, value)
    milliseconds = math.ceil(1000 * send_seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
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


def url_of(sock: socket.socket, *, has_tls: bool = False) -> str:
    """The URL of a listening socket; unix:PATH for a unix socket."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    scheme = "https" if has_tls else "http"
    host, port = sock.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def page_url(sock: socket.socket, *, has_tls: bool = False) -> str | None:
    """What to open in a browser of this machine; None for a unix socket, which none can open."""
    url = url_of(sock, has_tls=has_tls)
    if sock.family == socket.AF_UNIX:
        return None
    for anything, this_machine in (("//0.0.0.0:", "//127.0.0.1:"), ("//[::]:", "//[::1]:")):
        url = url.replace(anything, this_machine)
    return f"{url}/"


def replica_url(sock: socket.socket, config: ServerConfig) -> str | None:
    """Where the other servers reach this one; None where they cannot."""
    if config.replica_url is not None:
        return config.replica_url.rstrip("/")
    url = url_of(sock, has_tls=config.tls_cert is not None)
    if sock.family == socket.AF_UNIX:
        return None
    for anything in ("//0.0.0.0:", "//[::]:"):
        url = url.replace(anything, f"//{socket.gethostname()}:")
    return url


def bounded(config: ServerConfig, table: ConnectionTable) -> type[asyncio.Protocol]:
    """The class of connections for uvicorn, with its limits bound."""
    made: Any = partial(
        BoundedProtocol,
        table=table,
        receive_seconds=config.receive_seconds,
        send_seconds=config.send_seconds,
    )
    return cast("type[asyncio.Protocol]", made)


def run_server(
    app: FastAPI,
    engine: AsyncEngine,
    config: ServerConfig,
    sock: socket.socket,
    table: ConnectionTable,
    announce: Callable[[], None],
    tls: ssl.SSLContext | None = None,
) -> int:
    """Serve until a signal and return the exit status; `announce` is called once it is ready."""
    settings = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        ws="none",
        http=bounded(config, table),
        server_header=False,
        timeout_keep_alive=IDLE_CONNECTION_SECONDS,
        timeout_graceful_shutdown=FINAL_EVENT_SECONDS,  # type: ignore[arg-type]  # takes parts, too
        ssl_context_factory=None if tls is None else lambda *_: tls,
    )
    context: Context = app.state.context

    async def hand_over() -> None:
        if context.journal is not None:
            await context.journal.leave_all()

    server = DrainingServer(settings, table, engine, config, announce, hand_over)
    gc.freeze()  # what is loaded stays: collecting it would stop all streams for a while
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        server.run(sockets=[sock])
    finally:
        engine.stop()
    return server.exit_status


class DrainingServer(BoundedServer):
    """A server that still accepts connections while it drains, and answers 503."""

    def __init__(
        self,
        config: uvicorn.Config,
        table: ConnectionTable,
        engine: AsyncEngine,
        limits: ServerConfig,
        announce: Callable[[], None],
        hand_over: Callable[[], Awaitable[None]],
    ) -> None:
        """hand_over: gives turns that go on without their client to other servers."""
        super().__init__(config, table, limits.send_seconds)
        self.exit_status = 0
        self._draining = False
        self._engine = engine
        self._drain_seconds = limits.drain_seconds
        self._notice_seconds = 0.0 if limits.session_store is None else NOTICE_SECONDS
        self._announce = announce
        self._hand_over = hand_over

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Replaces uvicorn's, which stops accepting at once and ends by the signal."""
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
        """Start, watch the engine, and announce that requests are accepted."""
        await super().startup(sockets)
        self._spawn(self._exit_when_engine_fails())
        self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, which after a second signal would cut the end of the application."""
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()

    def _on_signal(self, number: int) -> None:
        if self._draining:
            self._stop_now(number)
        else:
            self._draining = True
            self._spawn(self._drain())

    def _stop_now(self, number: int) -> None:
        self.exit_status = 128 + number
        self._engine.cancel_all()
        self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        logger.info("shutting down: running requests have %g s to finish", self._drain_seconds)
        noticed = asyncio.get_running_loop().time() + self._notice_seconds
        self._engine.drain()
        try:
            async with asyncio.timeout(self._drain_seconds):
                await self._engine.wait_idle()
        except TimeoutError:
            await self._hand_over()
            self._engine.cancel_all()
        await asyncio.sleep(noticed - asyncio.get_running_loop().time())
        self.should_exit = True

    async def _exit_when_engine_fails(self) -> None:
        await self._engine.failed.wait()
        self.exit_status = 1
        await asyncio.sleep(FAILURE_SECONDS)
        self.should_exit = True


def warn_of_open_access(sock: socket.socket, config: ServerConfig) -> None:
    """Log a warning where other machines can connect without an API key."""
    if not (config.allow_unauthenticated or _is_local(sock) or _has_keys(config)):
        logger.warning(
            "other machines can connect to %s without an API key; set keys with --api-key-file, or"
            " silence this warning with --allow-unauthenticated",
            _host(sock),
        )


def describe_access(sock: socket.socket, config: ServerConfig) -> str:
    """Who can connect, for the start-up lines."""
    keys = "API key required" if _has_keys(config) else "no API key required"
    if sock.family == socket.AF_UNIX:
        return f"the socket's owner and group; {keys}"
    if not _is_local(sock):
        return f"open to other machines; {keys}"
    advice = "use --host 0.0.0.0 to open it"
    if not _has_keys(config):
        advice += ", --api-key-file FILE to require keys"
    return f"localhost only; {keys}; {advice}"


def _is_local(sock: socket.socket) -> bool:
    return sock.family == socket.AF_UNIX or ipaddress.ip_address(_host(sock)).is_loopback


def _host(sock: socket.socket) -> str:
    host: str = sock.getsockname()[0]
    return host.partition("%")[0]


def _has_keys(config: ServerConfig) -> bool:
    return bool(config.api_key or config.api_key_file)

"""Accepting connections one at a time, each when there is a place for it.

An event loop's own servers accept all that wait at once, before anything can count them: a burst
would take every descriptor that the process has. A TLS handshake has a place as well, so that
clients which never finish theirs take neither the descriptors nor the time of others.
"""

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import uvicorn

from cottention.server.http.connections import ConnectionTable, network_of, refusal
from cottention.server.http.errors import ApiError

logger = logging.getLogger("cottention")

MAX_REFUSED = 16
"""Refused connections that stay open for a moment, so that their clients read why."""

REFUSED_SECONDS = 1.0
HANDSHAKE_SECONDS = 10.0
"""Time for a TLS handshake."""

RETRY_SECONDS = 0.1
"""Pause after the system has refused to accept, for want of descriptors or memory."""

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class BoundedServer(uvicorn.Server):
    """A uvicorn server whose connections are counted by a table before they are made."""

    def __init__(
        self, config: uvicorn.Config, table: ConnectionTable, tls_shutdown_seconds: float = 30.0
    ) -> None:
        """tls_shutdown_seconds: time to send what is left and say goodbye, where there is TLS."""
        super().__init__(config)
        self._table = table
        self._tls_shutdown_seconds = tls_shutdown_seconds
        self._tasks: set[asyncio.Task[None]] = set()
        self._acceptors: list[asyncio.Task[None]] = []
        self._refused: dict[socket.socket, asyncio.TimerHandle] = {}

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, and accept connections of these listening sockets."""
        await super().startup(sockets=[])
        self._acceptors = [self._spawn(self._accept_all(sock)) for sock in sockets or []]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more connections, and end those that there are."""
        for task in self._acceptors:
            task.cancel()
        await asyncio.gather(*self._acceptors, return_exceptions=True)
        for sock in [*self._refused]:
            self._close_refused(sock)
        self._table.close_idle()
        await super().shutdown(sockets=sockets)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept_all(self, listening: socket.socket) -> None:
        listening.setblocking(False)
        loop, is_exhausted = asyncio.get_running_loop(), False
        while True:
            try:
                sock, address = await loop.sock_accept(listening)
            except OSError as error:
                if error.errno in EXHAUSTED:
                    if not is_exhausted:
                        logger.error("cannot accept connections for now: %s", error.strerror)
                    is_exhausted = True
                    await asyncio.sleep(RETRY_SECONDS)
                continue  # or the client has left already
            is_exhausted = False
            is_tcp = isinstance(address, tuple)  # clients of a unix socket have no addresses
            await self._connect(sock, network_of(address[0]) if is_tcp else "")

    async def _connect(self, sock: socket.socket, address: str) -> None:
        try:
            self._table.make_room(address)
        except ApiError as error:
            self._refuse(sock, error)
            return
        context = self.config.ssl
        if context is not None:
            handshake = Handshake(sock)
            self._table.add(handshake, address)
            self._spawn(self._encrypt(handshake, context))
            return
        with suppress(OSError):  # the client has left already
            loop = asyncio.get_running_loop()
            await loop.connect_accepted_socket(self._protocol_factory(), sock)

    async def _encrypt(self, handshake: "Handshake", context: ssl.SSLContext) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                self._protocol_factory(),
                handshake.sock,
                ssl=context,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=self._tls_shutdown_seconds,
            )
        except OSError as error:  # those of ssl are such
            logger.info("a TLS handshake failed: %s", getattr(error, "reason", None) or error)
        finally:
            self._table.remove(handshake)

    def _protocol_factory(self) -> Callable[[], asyncio.Protocol]:
        """As uvicorn makes its connections."""
        made: Any = self.config.http_protocol_class
        return lambda: made(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    def _refuse(self, sock: socket.socket, error: ApiError) -> None:
        """Answer before the request has come, and close when the client has had time to read.

        Where there is TLS, a client could not read it without a handshake: it is only closed.
        """
        logger.info("refused a connection: %s", error)
        if self.config.ssl is not None:
            sock.close()
            return
        with suppress(OSError):
            sock.send(refusal(error))
            sock.shutdown(socket.SHUT_WR)
        if len(self._refused) == MAX_REFUSED:
            self._close_refused(next(iter(self._refused)))
        loop = asyncio.get_running_loop()
        self._refused[sock] = loop.call_later(REFUSED_SECONDS, self._close_refused, sock)

    def _close_refused(self, sock: socket.socket) -> None:
        self._refused.pop(sock).cancel()
        sock.close()


class Handshake:
    """A connection that is not encrypted yet, as the table knows it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def close_idle(self) -> bool:
        """As Connection.close_idle: the handshake fails, which closes it."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        return True

"""`Replicas`: the servers that share the sessions, as one of them sees them.

It adopts turns whose server has died or handed them over, and finds the server that runs the turn
of a session. Runs on the event loop.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from cottention.engine.errors import (
    CottentionError,
    EngineStoppedError,
    SessionNotFoundError,
    StoreUnavailableError,
)
from cottention.server.http.errors import ApiError, unavailable
from cottention.server.replicas.relay import RELAYED, HttpRelay, RelayedResponse
from cottention.server.sessions.journal import JournalWriter
from cottention.server.sessions.store_threads import in_store_thread

if TYPE_CHECKING:  # it imports torch, which the server must not load
    from cottention.engine.sessions.manager import SessionManager
    from cottention.engine.sessions.types import AdoptedTurn

logger = logging.getLogger("cottention")

LOOK_SECONDS = 0.4
"""Between looks for turns that no server goes on with."""
REST_SECONDS = 2.0
"""Without looks, after a turn for which there was no room here."""
WAIT_SECONDS = 0.2
MAX_WAITS = 30
"""Looks for the server of a session that has just died."""

SESSION_ID = re.compile(r"sess-[0-9a-f]{32}")
"""The part of an answer's id that says where its request runs."""


class Replicas:
    """The other servers, and the turns that they leave to this one."""

    def __init__(
        self,
        sessions: "SessionManager",
        writer: JournalWriter,
        go_on: "Callable[[AdoptedTurn], Awaitable[None]]",
        is_accepting: Callable[[], bool],
    ) -> None:
        """go_on: runs a turn; returns when its events can be followed here."""
        self.writer = writer
        self.relay = HttpRelay(writer.journal)
        self._sessions = sessions
        self._go_on = go_on
        self._is_accepting = is_accepting
        self._task: asyncio.Task[None] | None = None
        self._rests_until = 0.0

    def start(self) -> None:
        """Adopt turns from now on."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Adopt no more, and close the connections to the others."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self.relay.close()

    async def adopt(self, session_id: str) -> None:
        """Go on with a session's turn, if none does. StoreUnavailableError."""
        if not self._may_adopt():
            return
        try:
            adopted = await in_store_thread(self._sessions.adopt, session_id)
        except StoreUnavailableError:
            raise
        except CottentionError as error:
            logger.error("the turn of session %s cannot go on here: %s", session_id, error)
            return
        if adopted is None:
            return
        try:
            await self._go_on(adopted)
        except (ApiError, EngineStoppedError) as error:
            is_busy = isinstance(error, EngineStoppedError) or error.status in (429, 503)
            logger.warning("the turn of session %s cannot go on here: %s", session_id, error)
            self._rests_until = asyncio.get_running_loop().time() + REST_SECONDS
            leave = partial(self._sessions.leave, adopted.turn, hands_over=is_busy)
            await in_store_thread(leave)
            if not is_busy:
                await in_store_thread(self._sessions.abandon, adopted.turn)
        except Exception:
            logger.exception("the turn of session %s could not go on, and is undone", session_id)
            await in_store_thread(self._sessions.abandon, adopted.turn)

    async def elsewhere(
        self,
        request: Request,
        raw: bytes,
        owner: str,
        session_id: str,
        is_here: Callable[[], bool],
    ) -> Response | None:
        """The response of the server that runs the session's turn.

        None where the turn is this server's, adopted now if need be, or where there is none.
        is_here: whether it runs here. Raises ApiError 503; SessionError.
        """
        journal = self.writer.journal
        for _ in range(MAX_WAITS):
            holder = await in_store_thread(journal.holder, session_id, owner)
            if holder is None or is_here() or not (holder.is_alive or holder.goes_on):
                return None
            if holder.is_alive and not holder.is_mine:
                if holder.url is None:
                    raise unavailable("another server, which tells no address, runs the turn")
                with contextlib.suppress(ConnectionError):  # it has just died
                    return await self.relay(holder.url, request, raw)
            elif not holder.goes_on:
                return None
            elif not holder.is_alive:
                await self.adopt(session_id)
            await asyncio.sleep(WAIT_SECONDS)
        raise unavailable("the server that runs the turn cannot be reached")

    async def anywhere(self, request: Request, raw: bytes) -> Response | None:
        """The first success that another server has for a request; None where none has."""
        if RELAYED in request.headers:
            return None
        urls = await in_store_thread(self.writer.journal.urls)
        asked = [self.relay(url, request, raw) for url in urls]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        found: Response | None = None
        for answer in answers:
            if not isinstance(answer, RelayedResponse):
                continue
            body = await answer.body_bytes()
            if answer.status_code == 200 and found is None:
                found = Response(body, 200, media_type="application/json")
        return found

    def _may_adopt(self) -> bool:
        has_rested = asyncio.get_running_loop().time() >= self._rests_until
        return has_rested and self._is_accepting() and self.writer.journal.is_steady

    async def _run(self) -> None:
        journal = self.writer.journal
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                if self._may_adopt():
                    for session_id in await in_store_thread(journal.waiting):
                        await self.adopt(session_id)
            except (StoreUnavailableError, SessionNotFoundError):
                continue
            except Exception:
                logger.exception("turns could not be adopted; it is tried again")


def session_of(request_id: str) -> str | None:
    """The session whose turn an answer's id names; None where it names none."""
    found = SESSION_ID.search(request_id)
    return found and found[0]

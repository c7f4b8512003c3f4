"""Who has a session's next turn, and that every turn ends.

Owns the line of those that wait, in the order they came, and that a lease is given back on every
path, a cancelled task's included. Lives on the event loop; what blocks runs in threads. What a
session is belongs to the engine's `Sessions`.
"""

import asyncio
import contextlib
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.types import Receive

from engine.errors import SessionBusyError
from server.errors import ApiError
from server.open_turn import OpenTurn
from server.orders import TurnTerms
from server.reading import ReadingClosed
from server.sampling import OnConflict

if TYPE_CHECKING:  # it brings torch with it, which the server does not know
    from engine.session import Turn
    from engine.sessions import Sessions

Key = tuple[str, str]
Line = deque[asyncio.Event]

ETAG = re.compile(r'"(\d{1,19})"')


@dataclass(frozen=True, slots=True)
class Asker:
    """Whose request it is, and at which position it expects the session; None: at any."""

    owner: str
    expected_position: int | None


def owner_of(request: Request) -> str:
    """Who asks: of a request's key, or everybody where there are none."""
    owner: str = request.scope.get("state", {}).get("owner", "")
    return owner


def asked_by(request: Request) -> Asker:
    """Of a request's key and its If-Match. Raises ApiError 400."""
    owner = owner_of(request)
    tag = request.headers.get("if-match", "*").strip()
    if tag == "*":
        return Asker(owner, None)
    found = ETAG.fullmatch(tag)
    if found is None:
        message = 'If-Match must be the ETag of a session, its position in quotes, such as "12"'
        raise ApiError(400, message, param="If-Match")
    return Asker(owner, int(found[1]))


class Turns:
    """The turns of one application."""

    def __init__(self, sessions: "Sessions") -> None:
        self._sessions = sessions
        self._lines: dict[Key, Line] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    @contextlib.asynccontextmanager
    async def turn(
        self, asker: Asker, terms: TurnTerms, receive: Receive
    ) -> AsyncIterator[OpenTurn]:
        """A turn, which ends with the block: abandoned unless something of it was to stay.

        Raises SessionError; ReadingClosed where the client leaves while it waits.
        """
        place = self.alone(asker.owner, terms.session_id, terms.on_conflict, receive)
        async with place as leave:
            begun = await self._begin(asker, terms)
            turn = OpenTurn(self._sessions, begun, terms.on_cancel, leave)
            try:
                yield turn
            finally:
                await asyncio.shield(self._spawn(turn.settle()))

    @contextlib.asynccontextmanager
    async def alone(
        self, owner: str, session_id: str, on_conflict: OnConflict, receive: Receive
    ) -> AsyncIterator[Callable[[], None]]:
        """Nobody else here changes the session meanwhile, or until what this gives is called.

        Raises SessionBusyError, ReadingClosed.

        Lines are an owner's own: another learns nothing of a session from its being busy.
        """
        line = self._lines.setdefault((owner, session_id), deque())
        if line and on_conflict == "error":
            raise SessionBusyError(
                'another turn has this session: try again, or "on_conflict": "wait"'
            )
        mine = asyncio.Event()
        line.append(mine)
        try:
            if line[0] is not mine:
                await _until(mine, receive)
            yield partial(self._leave, (owner, session_id), line, mine)
        finally:
            self._leave((owner, session_id), line, mine)

    async def wait_settled(self) -> None:
        """Return when no turn is left to be ended."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _leave(self, key: Key, line: Line, mine: asyncio.Event) -> None:
        """May be called again."""
        if mine not in line:
            return
        line.remove(mine)
        if line:
            line[0].set()
        else:
            del self._lines[key]

    async def _begin(self, asker: Asker, terms: TurnTerms) -> "Turn":
        """A thread cannot be cancelled: what it leases for nobody is given back."""
        begin, position = self._sessions.begin, asker.expected_position
        task = self._spawn(asyncio.to_thread(begin, asker.owner, terms.session_id, position))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._spawn(self._give_back(task))
            raise

    async def _give_back(self, task: "asyncio.Task[Turn]") -> None:
        with contextlib.suppress(Exception):  # then there is nothing to give back
            turn = await task
            await asyncio.to_thread(self._sessions.abandon, turn)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _until(mine: asyncio.Event, receive: Receive) -> None:
    """Wait for one's turn. Raises ReadingClosed where the client leaves first."""
    tasks = [asyncio.create_task(mine.wait()), asyncio.create_task(_gone(receive))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not mine.is_set():
            raise ReadingClosed
    finally:
        for task in tasks:
            task.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

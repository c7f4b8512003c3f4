"""Who has a session's next turn, and that every turn ends.

Owns the line of those that wait, in the order they came, and that a lease is given back on every
path, a cancelled task's included. Lives on the event loop; what blocks runs in threads. What a
session is belongs to the engine's `SessionManager`.
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

from cottention.engine.errors import SessionBusyError
from cottention.server.generation.output_stream import OutputStreamClosed
from cottention.server.generation.request import TurnOptions
from cottention.server.generation.sse import wait_disconnected
from cottention.server.http.errors import ApiError
from cottention.server.schemas.sampling import OnConflict
from cottention.server.sessions.live_events import LiveEvents
from cottention.server.sessions.turn import RunningTurn

if TYPE_CHECKING:  # it brings torch with it, which the server does not know
    from cottention.engine.sessions.manager import SessionManager
    from cottention.engine.sessions.types import Turn

Key = tuple[str, str]
Line = deque[asyncio.Event]

ETAG = re.compile(r'"(\d{1,19})"')


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is, and at which position it expects the session; None: at any."""

    owner: str
    expected_position: int | None


def owner_of(request: Request) -> str:
    """Who asks: of a request's key, or everybody where there are none."""
    owner: str = request.scope.get("state", {}).get("owner", "")
    return owner


def asked_by(request: Request) -> Caller:
    """Of a request's key and its If-Match. Raises ApiError 400."""
    owner = owner_of(request)
    tag = request.headers.get("if-match", "*").strip()
    if tag == "*":
        return Caller(owner, None)
    found = ETAG.fullmatch(tag)
    if found is None:
        message = 'If-Match must be the ETag of a session, its position in quotes, such as "12"'
        raise ApiError(400, message, param="If-Match")
    return Caller(owner, int(found[1]))


class TurnQueue:
    """The turns of one application."""

    def __init__(self, sessions: "SessionManager") -> None:
        self._sessions = sessions
        self._lines: dict[Key, Line] = {}
        self._live: dict[Key, LiveEvents] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    @contextlib.asynccontextmanager
    async def turn(
        self, asker: Caller, terms: TurnOptions, receive: Receive
    ) -> AsyncIterator[RunningTurn]:
        """A turn, which ends with the block: abandoned unless something of it was to stay.

        Raises SessionError; ReadingClosed where the client leaves while it waits.
        """
        place = self.alone(asker.owner, terms.session_id, terms.on_conflict, receive)
        async with place as leave:
            begun = await self._begin(asker, terms)
            turn = RunningTurn(self._sessions, begun, terms.on_cancel, leave)
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
                "another turn has this session: try again when it has ended; turns and forks may"
                ' have "on_conflict": "wait"'
            )
        mine = asyncio.Event()
        line.append(mine)
        try:
            if line[0] is not mine:
                await _until(mine, receive)
            yield partial(self._leave, (owner, session_id), line, mine)
        finally:
            self._leave((owner, session_id), line, mine)

    def go_on(
        self, key: Key, live: LiveEvents, work: Coroutine[Any, Any, None]
    ) -> asyncio.Task[None]:
        """Run a turn to its end, whoever waits for it; meanwhile its events can be followed."""
        self._live[key] = live
        task = self._spawn(work)
        task.add_done_callback(lambda _: self._forget(key, live))
        return task

    def live(self, owner: str, session_id: str) -> LiveEvents | None:
        """The events of a session's turn that goes on by itself, while it runs."""
        return self._live.get((owner, session_id))

    async def wait_settled(self) -> None:
        """Return when no turn is left to be ended."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _forget(self, key: Key, live: LiveEvents) -> None:
        """The next turn may have begun: a session is free before its last events are told."""
        if self._live.get(key) is live:
            del self._live[key]

    def _leave(self, key: Key, line: Line, mine: asyncio.Event) -> None:
        """May be called again."""
        if mine not in line:
            return
        line.remove(mine)
        if line:
            line[0].set()
        else:
            del self._lines[key]

    async def _begin(self, asker: Caller, terms: TurnOptions) -> "Turn":
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
    waiting = asyncio.create_task(mine.wait())
    try:
        await until_done(waiting, receive)
    finally:
        waiting.cancel()


async def until_done(task: asyncio.Task[Any], receive: Receive) -> None:
    """Wait for a task, which goes on where its caller does not. Raises what it raises.

    ReadingClosed where the client leaves first.
    """
    leaving = asyncio.create_task(wait_disconnected(receive))
    try:
        await asyncio.wait([task, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise OutputStreamClosed
        task.result()
    finally:
        leaving.cancel()

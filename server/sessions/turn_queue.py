"""The queue for each session's turns, in order of arrival.

Runs on the event loop; calls of `SessionManager` run in threads. Every turn that begins is ended,
also where its task is cancelled.
"""

import asyncio
import contextlib
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.types import Receive

from cottention.engine.errors import SessionBusyError
from cottention.server.generation.cancellation import CANCEL_SECONDS, Cancellation, CancelStatus
from cottention.server.generation.request import TurnOptions
from cottention.server.generation.sse import until_done
from cottention.server.http.errors import ApiError
from cottention.server.schemas.sampling import OnCancel, OnConflict
from cottention.server.sessions.live_events import LiveEvents
from cottention.server.sessions.turn import RunningTurn

if TYPE_CHECKING:  # it brings torch with it, which the server does not know
    from cottention.engine.sessions.manager import SessionManager
    from cottention.engine.sessions.types import Turn

Key = tuple[str, str]
"""Owner and session id. Queues are an owner's own: whether another's session is busy is private."""
Waiting = deque[asyncio.Event]

ETAG = re.compile(r'"(\d{1,19})"')


@dataclass(frozen=True, slots=True)
class Caller:
    """The owner of a request's key, and the position that it expects; None: any."""

    owner: str
    expected_position: int | None


def owner_of(request: Request) -> str:
    """The owner of a request's key; empty where the server has no keys."""
    owner: str = request.scope.get("state", {}).get("owner", "")
    return owner


def caller_of(request: Request) -> Caller:
    """The caller, from a request's key and its If-Match. Raises ApiError 400."""
    owner = owner_of(request)
    tag = request.headers.get("if-match", "*").strip()
    if tag == "*":
        return Caller(owner, None)
    found = ETAG.fullmatch(tag)
    if found is None:
        message = 'If-Match must be the ETag of a session, its position in quotes, such as "12"'
        raise ApiError(400, message, param="If-Match")
    return Caller(owner, int(found[1]))


@dataclass(frozen=True, slots=True, eq=False)
class ActiveTurn:
    """A turn that has its session, and whether it has given it back."""

    cancellation: Cancellation
    has_ended: asyncio.Event


class TurnQueue:
    """The turns of one application."""

    def __init__(self, sessions: "SessionManager") -> None:
        self._sessions = sessions
        self._queues: dict[Key, Waiting] = {}
        self._live: dict[Key, LiveEvents] = {}
        self._active: dict[Key, ActiveTurn] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    @contextlib.asynccontextmanager
    async def turn(
        self,
        caller: Caller,
        terms: TurnOptions,
        receive: Receive,
        cancellation: Cancellation,
    ) -> AsyncIterator[RunningTurn]:
        """Begin a turn when it is the caller's, and settle it at the end of the block.

        cancellation: what `cancel` of the session asks for while the turn has it.
        Raises SessionError; OutputStreamClosed where the client leaves while it waits.
        """
        place = self.exclusive(caller.owner, terms.session_id, terms.on_conflict, receive)
        async with place as leave:
            with self._activated((caller.owner, terms.session_id), cancellation):
                begun = await self._begin(caller, terms)
                turn = RunningTurn(self._sessions, begun, terms.on_cancel, leave)
                try:
                    yield turn
                finally:
                    await asyncio.shield(self._spawn(turn.settle()))

    @contextlib.asynccontextmanager
    async def adopted(
        self, begun: "Turn", on_cancel: OnCancel, cancellation: Cancellation
    ) -> AsyncIterator[RunningTurn]:
        """As `turn`, for one that another server has begun: it waits for nothing."""
        key = (begun.session.owner, begun.session.id)
        queue, mine = self._queues.setdefault(key, deque()), asyncio.Event()
        queue.appendleft(mine)
        leave = partial(self._leave, key, queue, mine)
        try:
            with self._activated(key, cancellation):
                turn = RunningTurn(self._sessions, begun, on_cancel, leave)
                try:
                    yield turn
                finally:
                    await asyncio.shield(self._spawn(turn.settle()))
        finally:
            leave()

    @contextlib.contextmanager
    def _activated(self, key: Key, cancellation: Cancellation) -> Iterator[None]:
        """A turn that can be found by its session; the next one may begin before it is left."""
        self._active[key] = active = ActiveTurn(cancellation, asyncio.Event())
        try:
            yield
        finally:
            cancellation.end()
            active.has_ended.set()
            if self._active.get(key) is active:
                del self._active[key]

    async def cancel(self, owner: str, session_id: str) -> CancelStatus | None:
        """Cancel a session's turn, and wait until it has ended, or for CANCEL_SECONDS.

        None where no turn runs.
        """
        active = self._active.get((owner, session_id))
        if active is None:
            return None
        active.cancellation.request()
        try:
            async with asyncio.timeout(CANCEL_SECONDS):
                await active.has_ended.wait()
        except TimeoutError:
            return "cancelling"
        return active.cancellation.status

    def is_active(self, owner: str, session_id: str) -> bool:
        """Whether a turn of this server has the session."""
        return (owner, session_id) in self._active

    def request_cancel(self, owner: str, session_id: str) -> None:
        """The same without waiting."""
        if active := self._active.get((owner, session_id)):
            active.cancellation.request()

    @contextlib.asynccontextmanager
    async def exclusive(
        self,
        owner: str,
        session_id: str,
        on_conflict: OnConflict,
        receive: Receive,
        *,
        is_next: bool = False,
    ) -> AsyncIterator[Callable[[], None]]:
        """Wait for the session; no other request changes it within the block.

        is_next: it comes before all others that wait.
        Gives a function that ends this before the block does. Raises SessionBusyError;
        OutputStreamClosed where the client leaves while it waits.
        """
        queue = self._queues.setdefault((owner, session_id), deque())
        if queue and on_conflict == "error":
            raise SessionBusyError(
                "another turn has this session: try again when it has ended; turns and forks may"
                ' have "on_conflict": "wait"'
            )
        mine = asyncio.Event()
        queue.insert(1 if is_next else len(queue), mine)
        try:
            if queue[0] is not mine:
                await _until(mine, receive)
            yield partial(self._leave, (owner, session_id), queue, mine)
        finally:
            self._leave((owner, session_id), queue, mine)

    def detach(
        self, key: Key, live: LiveEvents, work: Coroutine[Any, Any, None]
    ) -> asyncio.Task[None]:
        """Run a turn to its end without its client; meanwhile its events can be followed."""
        self._live[key] = live
        task = self._spawn(work)
        task.add_done_callback(lambda _: self._forget(key, live))
        return task

    def live_events(self, owner: str, session_id: str) -> LiveEvents | None:
        """The events of a session's detached turn; None where none runs."""
        return self._live.get((owner, session_id))

    async def wait_settled(self) -> None:
        """Return when every turn has ended."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _forget(self, key: Key, live: LiveEvents) -> None:
        """The next turn may have begun: a session is free before its last events are sent."""
        if self._live.get(key) is live:
            del self._live[key]

    def _leave(self, key: Key, queue: Waiting, mine: asyncio.Event) -> None:
        """Nothing happens the second time."""
        if mine not in queue:
            return
        queue.remove(mine)
        if queue:
            queue[0].set()
        else:
            del self._queues[key]

    async def _begin(self, caller: Caller, terms: TurnOptions) -> "Turn":
        """A thread cannot be cancelled: a turn that it begins for a cancelled task is abandoned."""
        begin, position = self._sessions.begin, caller.expected_position
        task = self._spawn(asyncio.to_thread(begin, caller.owner, terms.session_id, position))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._spawn(self._abandon(task))
            raise

    async def _abandon(self, task: "asyncio.Task[Turn]") -> None:
        with contextlib.suppress(Exception):  # then no turn has begun
            turn = await task
            await asyncio.to_thread(self._sessions.abandon, turn)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something that must end before the sessions are closed."""
        return self._spawn(work)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _until(mine: asyncio.Event, receive: Receive) -> None:
    """Wait for the event. Raises OutputStreamClosed where the client leaves first."""
    waiting = asyncio.create_task(mine.wait())
    try:
        await until_done(waiting, receive)
    finally:
        waiting.cancel()

"""The queue for each session's turns, in order of arrival.

Where other servers share the sessions, one of them may have a session: it is asked for again and
again. Among servers there is no order.

Runs on the event loop; calls of `SessionManager` run in threads. Every turn that begins is ended,
also where its task is cancelled.
"""

import asyncio
import contextlib
import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request
from starlette.types import Receive

from cottention.engine.errors import SessionBusyError
from cottention.server.generation.cancellation import CANCEL_SECONDS, Cancellation, CancelStatus
from cottention.server.generation.deadline import before_deadline
from cottention.server.generation.request import TurnOptions
from cottention.server.generation.sse import until_done
from cottention.server.http.errors import ApiError
from cottention.server.schemas.sampling import OnCancel, OnConflict
from cottention.server.sessions.live_events import LiveEvents
from cottention.server.sessions.store_threads import in_store_thread
from cottention.server.sessions.turn import RunningTurn

if TYPE_CHECKING:  # it brings torch with it, which the server does not know
    from cottention.engine.sessions.manager import SessionManager
    from cottention.engine.sessions.types import Turn

T = TypeVar("T")
Key = tuple[str, str]
"""Owner and session id. Queues are an owner's own: whether another's session is busy is private."""
Waiting = deque[asyncio.Event]

FIRST_PAUSE, LAST_PAUSE = 0.1, 1.0
"""Seconds between two tries to lease a session that another server has; each is twice the last."""
LATE_SECONDS = 4.0
"""For which a server that has missed heartbeats is waited for: then it is dead, or beats again."""

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

    def __init__(
        self, sessions: "SessionManager", check_accepting: Callable[[], None] = lambda: None
    ) -> None:
        """check_accepting: raises EngineStoppedError where the server begins no more turns."""
        self._sessions = sessions
        self._check_accepting = check_accepting
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
        key = (caller.owner, terms.session_id)
        async with self.exclusive(*key, terms.on_conflict, receive) as leave:
            with self._activated(key, cancellation) as active:
                begun = await self.when_free(
                    lambda: self._begin(caller, terms),
                    terms.on_conflict,
                    receive,
                    meanwhile=self._hidden(key, active),
                )
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
    def _activated(self, key: Key, cancellation: Cancellation) -> Iterator[ActiveTurn]:
        """A turn that can be found by its session; the next one may begin before it is left."""
        self._active[key] = active = ActiveTurn(cancellation, asyncio.Event())
        try:
            yield active
        finally:
            cancellation.end()
            active.has_ended.set()
            if self._active.get(key) is active:
                del self._active[key]

    @contextlib.contextmanager
    def _hidden(self, key: Key, active: ActiveTurn) -> Iterator[None]:
        """While another server has the session: who cancels its turn means the one there."""
        if self._active.get(key) is active:
            del self._active[key]
        yield
        self._active[key] = active

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
                ' have "on_conflict": "wait", and DELETE ?cancel=true'
            )
        mine = asyncio.Event()
        queue.insert(1 if is_next else len(queue), mine)
        try:
            if queue[0] is not mine:
                await _until(mine.wait(), receive)
            yield partial(self._leave, (owner, session_id), queue, mine)
        finally:
            self._leave((owner, session_id), queue, mine)

    async def when_free(
        self,
        work: Callable[[], Awaitable[T]],
        on_conflict: OnConflict,
        receive: Receive,
        deadline: float | None = None,
        meanwhile: AbstractContextManager[None] | None = None,
    ) -> T:
        """The result of `work`, which leases a session that is this server's turn by `exclusive`.

        While another server has it: on_conflict "wait" tries again until it is free, "error" only
        where that server may be dead. deadline: of waiting, by the event loop's clock. meanwhile:
        entered while another server has it. Raises SessionBusyError; EngineStoppedError; ApiError
        504; OutputStreamClosed where the client leaves; and what `work` raises.
        """
        try:
            return await work()
        except SessionBusyError as error:
            busy = error
        now = asyncio.get_running_loop().time
        pause, late_until = FIRST_PAUSE, now() + LATE_SECONDS
        with meanwhile or contextlib.nullcontext():
            while on_conflict == "wait" or (busy.is_late and now() < late_until):
                await before_deadline(deadline, _until(asyncio.sleep(pause), receive))
                self._check_accepting()
                pause = min(2 * pause, LAST_PAUSE)
                try:
                    return await work()
                except SessionBusyError as error:
                    busy = error
        raise busy

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
        task = self._spawn(in_store_thread(begin, caller.owner, terms.session_id, position))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._spawn(self._abandon(task))
            raise

    async def _abandon(self, task: "asyncio.Task[Turn]") -> None:
        with contextlib.suppress(Exception):  # then no turn has begun
            turn = await task
            await in_store_thread(self._sessions.abandon, turn)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something that must end before the sessions are closed."""
        return self._spawn(work)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _until(work: Coroutine[Any, Any, Any], receive: Receive) -> None:
    """Wait for `work`. Raises OutputStreamClosed where the client leaves first."""
    waiting = asyncio.create_task(work)
    try:
        await until_done(waiting, receive)
    finally:
        waiting.cancel()

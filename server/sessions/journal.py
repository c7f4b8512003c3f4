"""The journal of turns that go on without their client, as the server writes it.

What such turns generate and tell is collected and stored together, a few times a second. Where a
server that adopts a turn computes the same bits again, events need not wait for it. Elsewhere they
do: what was told must be known to who goes on.

A server whose heartbeats are missed tells nothing: others may have adopted its turns. When it beats
again it looks first which turns are still its own.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from cottention.engine.errors import SessionError, SessionMovedError, StoreUnavailableError
from cottention.engine.sessions.store.journal import Chunk, JournaledTurn, SessionJournal
from cottention.engine.sessions.store.protocol import Lease
from cottention.server.sessions.store_threads import in_store_thread

logger = logging.getLogger("cottention")

INTERVAL_SECONDS = 0.1
"""Between two writes where events do not wait for them: what is computed again at most."""
RETRY_SECONDS = 0.2
LEAVE_SECONDS = 5.0
HAND_OVER_SECONDS = 60.0
"""How long it is tried to hand a turn over whose end could not be stored."""


class Leave(Protocol):
    """Ends a turn here; hands_over: another server shall go on with it. Raises SessionError."""

    def __call__(self, *, hands_over: bool) -> Awaitable[None]: ...


class TurnJournal:
    """The journal of one turn, which has begun. `close` must be called.

    is_lost: another server has the turn. is_leaving: another one shall have it.
    """

    def __init__(
        self, writer: "JournalWriter", lease: Lease, life: int | None, leave: Callable[[], None]
    ) -> None:
        """life: of the server, when the turn was its own. leave: ends the turn's generation."""
        self.lease = lease
        self.is_lost = False
        self.is_leaving = False
        self.closed = asyncio.Event()
        self._writer = writer
        self._life = life
        self._leave = leave
        self._ids: list[int] = []
        self._events: list[bytes] = []
        self._unwritten: Chunk | None = None
        self._n = 0
        self._num_added = self._num_written = 0
        self._written = asyncio.Event()

    async def tell(self, ids: Sequence[int], events: bytes) -> None:
        """Journal what comes next; return when it may be told. SessionMovedError: never."""
        self._ids += ids
        self._events.append(events)
        self._num_added += 1
        self._writer.wake()
        if self._writer.gates:
            await self.flush()
        await self.wait_held()

    async def flush(self) -> None:
        """Return when all of it is stored. SessionMovedError."""
        stop = self._num_added
        while self._num_written < stop:
            self._check()
            self._written.clear()
            await self._written.wait()

    def leave(self) -> None:
        """End the turn here, so that another server goes on with it."""
        self.is_leaving = True
        self._leave()

    async def left(self, leave: "Leave") -> None:
        """Leave the turn to another server, with all that it has told.

        leave: ends it here.
        """
        if self.is_leaving:
            self.is_leaving = False  # it is stored, and told no more
            with contextlib.suppress(SessionError, TimeoutError):
                async with asyncio.timeout(LEAVE_SECONDS):
                    await self.flush()
        try:
            await leave(hands_over=not self.is_lost)
        except SessionError:
            self._writer.hand_over_later(self.lease)

    def close(self) -> None:
        """The turn has ended here. Idempotent."""
        self._writer.remove(self)
        self.closed.set()

    def take(self) -> Chunk | None:
        """What is to be stored next; the same until `note_written`."""
        if self._unwritten is None and self._events and not self.is_lost:
            self._unwritten = Chunk(self.lease, self._n, [*self._ids], b"".join(self._events))
            self._num_taken = self._num_added
            self._ids.clear()
            self._events.clear()
            self._n += 1
        return self._unwritten

    def note_written(self, *, is_held: bool) -> None:
        """What was taken is stored, or the turn is no longer this server's."""
        self._unwritten = None
        self.is_lost = self.is_lost or not is_held
        self._num_written = self._num_taken
        self._written.set()

    async def wait_held(self) -> None:
        """Return when this server surely has the turn. SessionMovedError: it has not."""
        journal = self._writer.journal
        while journal.life != self._life or self.is_lost or self.is_leaving:
            self._check()
            life = journal.life
            if life is not None:
                with contextlib.suppress(StoreUnavailableError):
                    self.is_lost = not await in_store_thread(journal.holds, self.lease)
                    if not self.is_lost and journal.life == life:
                        self._life = life
                        continue
            await asyncio.sleep(RETRY_SECONDS)

    def _check(self) -> None:
        if self.is_lost or self.is_leaving:
            raise SessionMovedError(
                f"the turn of session {self.lease.session_id!r} goes on at another server"
            )


class JournalWriter:
    """The journals of all turns of this server. Runs on the event loop."""

    def __init__(self, journal: SessionJournal, *, gates: bool) -> None:
        """gates: events wait until they are stored."""
        self.journal = journal
        self.gates = gates
        self._turns: dict[TurnJournal, None] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(
        self, lease: Lease, turn: JournaledTurn, leave: Callable[[], None]
    ) -> TurnJournal:
        """Journal a turn from its first event on. SessionMovedError; StoreUnavailableError."""
        life = self.journal.life
        await in_store_thread(self.journal.begin, lease, turn)
        return self._add(TurnJournal(self, lease, life, leave))

    def go_on(self, lease: Lease, leave: Callable[[], None]) -> TurnJournal:
        """The same for a turn that was adopted; whether it is still ours is looked up."""
        return self._add(TurnJournal(self, lease, None, leave))

    def wake(self) -> None:
        """There is something to store."""
        self._wake.set()

    def remove(self, turn: TurnJournal) -> None:
        """The opposite of `begin` and `go_on`. Idempotent."""
        self._turns.pop(turn, None)

    async def leave_all(self) -> None:
        """Hand all turns over, and take none any more."""
        with contextlib.suppress(StoreUnavailableError):
            await in_store_thread(self.journal.drain)
        turns = [*self._turns]
        for turn in turns:
            turn.leave()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_SECONDS):
                for turn in turns:
                    await turn.closed.wait()

    def hand_over_later(self, lease: Lease) -> None:
        """Hand a turn over as soon as the store takes it."""
        task = asyncio.create_task(self._hand_over(lease))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _hand_over(self, lease: Lease) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HAND_OVER_SECONDS):
                while True:
                    with contextlib.suppress(StoreUnavailableError):
                        await in_store_thread(self.journal.hand_over, lease)
                        return
                    await asyncio.sleep(RETRY_SECONDS)

    def _add(self, turn: TurnJournal) -> TurnJournal:
        self._turns[turn] = None
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return turn

    async def _run(self) -> None:
        """While there are turns."""
        while self._turns:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._wake.wait()
            self._wake.clear()
            if not self.gates:
                await asyncio.sleep(INTERVAL_SECONDS)
            taken = {turn: chunk for turn in self._turns if (chunk := turn.take())}
            if not taken:
                continue
            try:
                held = await in_store_thread(self.journal.append, taken.values())
            except StoreUnavailableError:  # the store has logged it
                self._wake.set()
                await asyncio.sleep(RETRY_SECONDS)
            except Exception:
                logger.exception("turns could not be journaled; it is tried again")
                self._wake.set()
                await asyncio.sleep(1.0)
            else:
                for turn in taken:
                    turn.note_written(is_held=turn.lease in held)

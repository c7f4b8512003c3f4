"""A running turn of a session: what of it was delivered, and how it ends.

A turn ends exactly once: with its whole text, with the text that was delivered, or undone.
"""

import asyncio
import codecs
import io
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from cottention.engine.errors import SessionError
from cottention.engine.outputs import FinishReason
from cottention.engine.state.event_log import NO_EVENTS, EventLog
from cottention.engine.state.session_state import MAX_PENDING
from cottention.server.generation.output_stream import OutputDelta
from cottention.server.schemas.sampling import OnCancel
from cottention.server.sessions.store_threads import in_store_thread

if TYPE_CHECKING:  # they bring torch with them, which the server does not know
    from cottention.engine.sessions.manager import SessionManager
    from cottention.engine.sessions.store.protocol import Lease
    from cottention.engine.sessions.types import Session, SessionAnswer, Turn
    from cottention.engine.state.session_state import SessionState

logger = logging.getLogger("cottention")

EventsOf = Callable[["Session"], EventLog]
"""The events that are stored with a turn, given the session after it, which the last event has."""


def no_events(_: "Session") -> EventLog:
    """For a turn that ends with its connection: no client can ask for its events later."""
    return NO_EVENTS


class RunningTurn:
    """A turn that has begun. `settle` must be called in any case.

    is_whole_or_undone: `settle` keeps nothing of it: it may be sent again.
    """

    def __init__(
        self,
        sessions: "SessionManager",
        turn: "Turn",
        on_cancel: OnCancel,
        on_end: Callable[[], None],
    ) -> None:
        """on_end: called when the session is free, before the last event is sent."""
        self._sessions = sessions
        self._turn = turn
        self._on_cancel = on_cancel
        self._on_end = on_end
        self._ids: list[int] = []
        self._text = io.StringIO()
        self._ending: asyncio.Task[Session] | None = None
        self.is_whole_or_undone = False

    @property
    def session_id(self) -> str:
        """The session's id."""
        return self._turn.session.id

    @property
    def state(self) -> "SessionState":
        """The session's state before the turn."""
        return self._turn.state

    def set_prompt(
        self, start: "SessionState", prompt_ids: Sequence[int], table: Sequence[bytes], window: int
    ) -> None:
        """What a cut turn is rebuilt from, before its first id is delivered.

        start: the state under the turn's context policy. table: the bytes of each id. window:
        number of recent ids that a session keeps.
        """
        self._start, self._prompt_ids, self._table = start, prompt_ids, table
        self._window = window

    def add_delivered(self, piece: OutputDelta) -> None:
        """Count a piece whose text has been written to the socket, or into the event buffer."""
        self.add_delivered_text(piece.text, () if piece.tokens is None else piece.tokens.ids)

    def add_delivered_text(self, text: str, ids: Sequence[int]) -> None:
        """As `add_delivered`, of the text of these ids."""
        self._ids += ids
        self._text.write(text)

    def discard_delivered(self) -> None:
        """Undo the whole turn at its end."""
        self._ids.clear()

    async def finish(
        self,
        piece: OutputDelta,
        events_of: EventsOf = no_events,
        answer: "SessionAnswer | None" = None,
    ) -> "Session":
        """End the turn with its last piece, which is sent next. Raises SessionError."""
        if piece.finish_reason is FinishReason.ERROR:
            self.discard_delivered()
        elif piece.state is None:
            self.add_delivered(piece)
        state = self._cut() if piece.state is None else piece.state
        return await (self._abandon() if state is None else self.commit(state, events_of, answer))

    async def commit(
        self,
        state: "SessionState",
        events_of: EventsOf = no_events,
        answer: "SessionAnswer | None" = None,
    ) -> "Session":
        """Commit the turn with this state, also where the caller is cancelled meanwhile.

        answer: of its idempotency key. Raises SessionError.
        """
        stored = self._sessions.preview(self._turn, state)
        logs = events_of(stored), events_of(replace(stored, is_durable=False))
        commit = partial(self._sessions.commit, self._turn, state, *logs)
        if answer is not None:
            commit = partial(commit, answer=answer)
        return await self._end(in_store_thread(commit))

    async def settle(self) -> None:
        """End the turn if it has not ended: with what was delivered, unless that is undone."""
        try:
            is_kept = self._ending is None and not self.is_whole_or_undone
            if is_kept and (state := self._cut()) is not None:
                await self.commit(state)
            if self._ending is not None:
                await self._ending
                return
        except SessionError as error:
            logger.error("a turn of session %s is lost: %s", self._turn.session.id, error)
        except Exception:
            logger.exception("a turn of session %s is lost", self._turn.session.id)
        await self._abandon()

    @property
    def lease(self) -> "Lease":
        """Of the session."""
        return self._turn.lease

    async def leave(self, *, hands_over: bool) -> None:
        """End the turn here, and leave it to another server as it is.

        hands_over: as SessionManager.leave has it. StoreUnavailableError: it was not handed over.
        """

        async def left() -> "Session":
            return self._turn.session

        self._ending = asyncio.create_task(left())
        try:
            leave = partial(self._sessions.leave, self._turn, hands_over=hands_over)
            await asyncio.shield(asyncio.create_task(in_store_thread(leave)))
        finally:
            self._on_end()

    async def _abandon(self) -> "Session":
        async def abandoned() -> "Session":
            await in_store_thread(self._sessions.abandon, self._turn)
            return self._turn.session

        return await self._end(abandoned())

    async def _end(self, work: "Coroutine[Any, Any, Session]") -> "Session":
        self._ending = asyncio.create_task(work)
        session = await asyncio.shield(self._ending)
        self._on_end()
        return session

    def _cut(self) -> "SessionState | None":
        """The state with the ids that were delivered; None where the turn is undone."""
        if self._on_cancel == "rollback" or not self._ids:
            return None
        before = b"" if self._prompt_ids else self.state.undecoded  # as the engine begins a text
        num = num_delivered(self._ids, self._text.getvalue(), self._table, before)
        if not num:
            return None
        state = self._start.extended(self._prompt_ids, self._ids[:num], self._window)
        return state if len(state.pending) <= MAX_PENDING else None


def num_delivered(
    ids: Sequence[int], text: str, table: Sequence[bytes], undecoded: bytes = b""
) -> int:
    """How many of these ids are in `text` as a whole; the rest were held back, or end in the middle
    of a character.

    undecoded: bytes that the first id may complete. Ids without bytes count with the one before.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.setstate((undecoded, 0))
    length = num = 0
    for place, token_id in enumerate(ids, 1):
        length += len(decoder.decode(table[token_id]))
        if length > len(text):
            break
        if not decoder.getstate()[0]:
            num = place
    return num

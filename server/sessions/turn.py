"""One turn of a session that runs, and its end.

Owns what of the turn has reached the client, and that it ends once: with all of it, with what was
delivered, or as if it had not been. Does not know who waits for the session.
"""

import asyncio
import codecs
import io
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cottention.engine.outputs import FinishReason
from cottention.engine.state.event_log import EventLog
from cottention.server.generation.output_stream import OutputDelta
from cottention.server.schemas.sampling import OnCancel

if TYPE_CHECKING:  # they bring torch with them, which the server does not know
    from cottention.engine.sessions.manager import SessionManager
    from cottention.engine.sessions.types import Session, Turn
    from cottention.engine.state.session_state import SessionState

logger = logging.getLogger("cottention")

Keep = Callable[["Session"], EventLog]
"""What is kept of what the turn told, which ends with what the session is after it."""


def keep_nothing(_: "Session") -> EventLog:
    """For a turn whose client is there to its end, or has what it wants."""
    return EventLog()


class RunningTurn:
    """A session that is leased; `settle` in any case."""

    def __init__(
        self,
        sessions: "SessionManager",
        turn: "Turn",
        on_cancel: OnCancel,
        on_end: Callable[[], None],
    ) -> None:
        """on_end: called once the session is free, before its client is told."""
        self._sessions = sessions
        self._turn = turn
        self._on_cancel = on_cancel
        self._on_end = on_end
        self._ids: list[int] = []
        self._text = io.StringIO()
        self._ending: asyncio.Task[Session] | None = None

    @property
    def session_id(self) -> str:
        """Of the session."""
        return self._turn.session.id

    @property
    def state(self) -> "SessionState":
        """The session before the turn."""
        return self._turn.state

    def reads(
        self, start: "SessionState", prompt_ids: Sequence[int], table: Sequence[bytes], window: int
    ) -> None:
        """What the turn is made of: session, prompt, the bytes of ids, how many ids are kept."""
        self._start, self._prompt_ids, self._table = start, prompt_ids, table
        self._window = window

    def delivered(self, piece: OutputDelta) -> None:
        """A piece's text has been written to the socket."""
        if piece.tokens is not None:
            self._ids += piece.tokens.ids
        self._text.write(piece.text)

    def forget(self) -> None:
        """Nothing of this turn stays."""
        self._ids.clear()

    async def finish(self, piece: OutputDelta, keep: Keep = keep_nothing) -> "Session":
        """End with a choice's last piece, which is told next. Raises SessionError."""
        if piece.finish_reason is FinishReason.ERROR:
            self.forget()
        elif piece.state is None:
            self.delivered(piece)
        state = self._cut() if piece.state is None else piece.state
        return await (self._abandon() if state is None else self.commit(state, keep))

    async def commit(self, state: "SessionState", keep: Keep = keep_nothing) -> "Session":
        """Make `state` the session. It goes on where its caller is cancelled.

        Raises SessionError.
        """
        before, position = self._turn.session, state.num_tokens

        def outbox(is_durable: bool) -> EventLog:
            return keep(replace(before, position=position, is_durable=is_durable))

        return await self._end(asyncio.to_thread(self._sessions.commit, self._turn, state, outbox))

    async def settle(self) -> None:
        """End the turn if it has not ended: with what was delivered, if that may stay."""
        try:
            if self._ending is None and (state := self._cut()) is not None:
                await self.commit(state)
            if self._ending is not None:
                await self._ending
                return
        except Exception:
            logger.exception("a turn of session %s is lost", self._turn.session.id)
        await self._abandon()

    async def _abandon(self) -> "Session":
        async def abandoned() -> "Session":
            await asyncio.to_thread(self._sessions.abandon, self._turn)
            return self._turn.session

        return await self._end(abandoned())

    async def _end(self, work: "Coroutine[Any, Any, Session]") -> "Session":
        self._ending = asyncio.create_task(work)
        session = await asyncio.shield(self._ending)
        self._on_end()
        return session

    def _cut(self) -> "SessionState | None":
        """The session with as much of the turn as was delivered; None where none of it stays."""
        if self._on_cancel == "rollback" or not self._ids:
            return None
        before = b"" if self._prompt_ids else self.state.undecoded  # as the engine begins a text
        num = num_delivered(self._ids, self._text.getvalue(), self._table, before)
        if not num:
            return None
        return self._start.extended(self._prompt_ids, self._ids[:num], self._window)


def num_delivered(
    ids: Sequence[int], text: str, table: Sequence[bytes], undecoded: bytes = b""
) -> int:
    """How many of these ids `text` tells whole: the rest was held back, or is half a character.

    undecoded: bytes that the first id may complete. Ids without bytes are told with what is before.
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

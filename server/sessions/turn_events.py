"""A session's turn as events, from its first piece to its end.

Owns that the session has moved before its client is told so, and what came of the turn. Does not
know where the events go.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

from cottention.engine.errors import SessionError
from cottention.engine.outputs import FinishReason
from cottention.engine.state.event_log import EventLog
from cottention.server.generation.choice_format import compact
from cottention.server.generation.output_stream import OutputDelta, OutputStream
from cottention.server.generation.sse import KEEP_ALIVE, Events
from cottention.server.http.errors import ApiError, engine_failed, session_error
from cottention.server.schemas.session_responses import shape_in_answer
from cottention.server.sessions.turn import RunningTurn

if TYPE_CHECKING:  # it brings torch with it, which the server does not know
    from cottention.engine.sessions.types import Session

KeepText = Callable[[str], EventLog]
"""What is kept of a turn that ends with this text."""


def keep_no_text(_: str) -> EventLog:
    """For a turn that nobody can ask for again."""
    return EventLog()


class TurnEvents:
    """Tells one turn. session, error: what came of it, once all has been told.

    whole: all that was told, as one piece, where `gathers`.
    """

    def __init__(
        self,
        reading: OutputStream,
        events: Events,
        turn: RunningTurn,
        keep: KeepText = keep_no_text,
        *,
        gathers: bool = False,
    ) -> None:
        self._reading = reading
        self.events = events
        self._turn = turn
        self._keep = keep
        self._gathers = gathers
        self.whole = OutputDelta()
        self.session: Session | None = None
        self.error: ApiError | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the text that was told last was the end."""
        return self.session is not None or self.error is not None

    async def texts(self, idle_seconds: float | None = None) -> AsyncIterator[str]:
        """Events, and a comment after `idle_seconds` of none; each is delivered when it returns."""
        reading, turn = self._reading, self._turn
        while True:
            pieces = await reading.take(idle_seconds)
            chunks = await self.events.chunks(pieces)
            if not pieces:
                yield KEEP_ALIVE
                continue
            [piece] = pieces.values()
            if self._gathers:
                self.whole.merge(piece)
            if piece.finish_reason is not None:
                yield await self._ended(piece, chunks)
                return
            yield self._framed(chunks)
            if not reading.is_closed:
                turn.delivered(piece)

    async def _ended(self, piece: OutputDelta, chunks: Sequence[str]) -> str:
        """The last events, once the session is what they say."""
        failed = engine_failed() if piece.finish_reason is FinishReason.ERROR else None

        def told(session: "Session") -> str:
            beside = f',"session":{compact(shape_in_answer(session))}'
            end = self.events.error(failed) if failed else self._last()
            return self._framed(chunks, beside) + end

        try:
            self.session = await self._turn.finish(piece, lambda session: self._keep(told(session)))
        except SessionError as error:
            self.error = session_error(error)
            return self.events.error(self.error)
        self.error = failed
        return told(self.session)

    def _framed(self, chunks: Sequence[str], beside: str = "") -> str:
        return self.events.framed(chunks, self._reading.num_generated, beside)

    def _last(self) -> str:
        return self.events.last(self._reading.num_generated)

"""A session's turn as server-sent events; the turn is committed before its last event is sent."""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

from cottention.engine.errors import SessionError
from cottention.engine.outputs import FinishReason
from cottention.engine.state.event_log import NO_EVENTS, EventLog
from cottention.server.generation.choice_format import compact
from cottention.server.generation.output_stream import OutputDelta, OutputStream
from cottention.server.generation.sse import KEEP_ALIVE, Events
from cottention.server.http.errors import ApiError, engine_failed, session_error
from cottention.server.schemas.session_responses import shape_in_answer
from cottention.server.sessions.turn import RunningTurn

if TYPE_CHECKING:  # it brings torch with it, which the server does not know
    from cottention.engine.sessions.types import Session

LogEndingWith = Callable[[str], EventLog]
"""The events to store with a turn whose last events are these."""


def no_log(_: str) -> EventLog:
    """For a turn that ends with its connection: no client can ask for its events later."""
    return NO_EVENTS


class TurnEvents:
    """The events of one turn. session, error: its outcome, after the last event.

    whole: the turn's output as one piece, where `gathers`.
    """

    def __init__(
        self,
        reading: OutputStream,
        events: Events,
        turn: RunningTurn,
        log_ending_with: LogEndingWith = no_log,
        *,
        gathers: bool = False,
    ) -> None:
        self._reading = reading
        self.events = events
        self._turn = turn
        self._log_ending_with = log_ending_with
        self._gathers = gathers
        self.whole = OutputDelta()
        self.session: Session | None = None
        self.error: ApiError | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the last text of `texts` was the end of the turn."""
        return self.session is not None or self.error is not None

    async def texts(self, idle_seconds: float | None = None) -> AsyncIterator[str]:
        """Events as text, and a comment after `idle_seconds` without any.

        A text counts as delivered when the next one is asked for.
        """
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
                turn.add_delivered(piece)

    async def _ended(self, piece: OutputDelta, chunks: Sequence[str]) -> str:
        """End the turn; returns its last events, which describe the session after it."""
        failed = engine_failed() if piece.finish_reason is FinishReason.ERROR else None

        def last_events(session: "Session") -> str:
            beside = f',"session":{compact(shape_in_answer(session))}'
            end = self.events.error(failed) if failed else self._last()
            return self._framed(chunks, beside) + end

        try:
            self.session = await self._turn.finish(
                piece, lambda session: self._log_ending_with(last_events(session))
            )
        except SessionError as error:
            self.error = session_error(error)
            return self.events.error(self.error)
        self.error = failed
        return last_events(self.session)

    def _framed(self, chunks: Sequence[str], beside: str = "") -> str:
        return self.events.framed(chunks, self._reading.num_generated, beside)

    def _last(self) -> str:
        return self.events.last(self._reading.num_generated)

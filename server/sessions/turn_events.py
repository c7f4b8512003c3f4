"""A session's turn as server-sent events; the turn is committed before its last event is sent."""

import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cottention.engine.errors import SessionError, SessionMovedError, StoreUnreachableError
from cottention.engine.outputs import FinishReason, Output
from cottention.engine.state.event_log import NO_EVENTS, EventLog
from cottention.server.generation.json_pieces import compact
from cottention.server.generation.output_stream import OutputDelta, OutputStream
from cottention.server.generation.sse import EventFormatter, EventWriter
from cottention.server.http.answer_writer import AnswerWriter
from cottention.server.http.errors import ApiError, engine_failed, session_error, turn_failed
from cottention.server.schemas.session_responses import session_summary
from cottention.server.sessions.journal import TurnJournal
from cottention.server.sessions.turn import RunningTurn

if TYPE_CHECKING:  # it brings torch with it, which the server does not know
    from cottention.engine.sessions.types import Session, SessionAnswer

logger = logging.getLogger("cottention")

LogEndingWith = Callable[[str], EventLog]
"""The events to store with a turn whose last events are these."""


AnswerEndingWith = Callable[[Callable[[], str]], "SessionAnswer | None"]
"""The answer to store with a turn whose last events are those that a function returns then."""


def no_answer(_: Callable[[], str]) -> None:
    """For a turn without an idempotency key."""


def no_log(_: str) -> EventLog:
    """For a turn that ends with its connection: no client can ask for its events later."""
    return NO_EVENTS


@dataclass(frozen=True, slots=True)
class TurnWriter(EventWriter):
    """A stream's `Writer` of a turn's events, which the turn counts as delivered."""

    turn: RunningTurn

    def write(self, choice: int, output: Output, num_tokens: int) -> bool:
        """As Writer.write."""
        if not self.formatter.write(choice, output, num_tokens, self.answer):
            return False
        self.turn.add_delivered_text(output.text, output.token_ids)
        return True


class TurnEvents:
    """The events of one turn. session, error: its outcome, after the last event.

    whole: the turn's output as one delta, where `gathers`.
    """

    def __init__(
        self,
        stream: OutputStream,
        formatter: EventFormatter,
        turn: RunningTurn,
        log_ending_with: LogEndingWith = no_log,
        answer_ending_with: AnswerEndingWith = no_answer,
        *,
        gathers: bool = False,
        journal: TurnJournal | None = None,
        num_known: int = 0,
    ) -> None:
        """journal: of a turn that goes on also without its server. num_known: ids that another
        server has told of it.
        """
        self._stream = stream
        self._formatter = formatter
        self._turn = turn
        self._log_ending_with = log_ending_with
        self._answer_ending_with = answer_ending_with
        self._gathers = gathers
        self._journal = journal
        self._num_known = num_known
        self.whole = OutputDelta()
        self.session: Session | None = None
        self.error: ApiError | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the last text of `texts` was the end of the turn."""
        return self.session is not None or self.error is not None

    async def events(self, idle_seconds: float) -> AsyncIterator[bytes]:
        """As EventSource.events."""
        async for text in self.texts(idle_seconds):
            yield text.encode()

    def write_with(self, writer: AnswerWriter) -> None:
        """From now on write events as their tokens come; `events` has the rest, and the end.

        For a turn without a journal, of which nothing is gathered or known.
        """

        self._stream.writer = TurnWriter(self._formatter, writer, self._turn)

    def close(self) -> None:
        """Cancel the turn if it has not ended."""
        self._stream.close()

    async def texts(self, idle_seconds: float | None = None) -> AsyncIterator[str]:
        """Events as text; an empty one after `idle_seconds` without any.

        SessionMovedError, StoreUnreachableError: the turn, which is journaled, goes on elsewhere.
        A text counts as delivered when the next one is asked for.
        """
        stream, turn = self._stream, self._turn
        adopted_at = time.monotonic() if self._num_known else None
        while True:
            deltas = await stream.take(idle_seconds)
            chunks = await self._formatter.chunks(deltas)
            if not deltas:
                yield ""
                continue
            [delta] = deltas.values()
            if self._gathers:
                self.whole.merge(delta)
            if delta.finish_reason is not None:
                yield await self._ended(delta, chunks)
                return
            if self._num_known > 0:
                self._num_known -= delta.num_tokens
                turn.add_delivered(delta)
                continue
            if adopted_at is not None:
                seconds, adopted_at = time.monotonic() - adopted_at, None
                logger.info("session %s: adopted turn read in %.3f s", turn.session_id, seconds)
            text = self._formatter.frame(chunks)
            if self._journal is not None:
                assert delta.tokens is not None
                await self._journal.tell(delta.tokens.ids, text.encode())
            yield text
            if not stream.is_closed:
                turn.add_delivered(delta)

    async def _ended(self, delta: OutputDelta, chunks: Sequence[str]) -> str:
        """End the turn; returns its last events, which describe the session after it.

        SessionMovedError, StoreUnreachableError: as in `texts`.
        """
        failed = engine_failed() if delta.finish_reason is FinishReason.ERROR else None

        def last_events(session: "Session") -> str:
            extra = f',"session":{compact(session_summary(session))}'
            end = self._formatter.error(failed) if failed else self._formatter.end()
            return self._formatter.frame(chunks, extra, is_end=not failed) + end

        if self._journal is not None:
            await self._journal.wait_held()
        try:
            after: list[str] = []

            def log_of(session: "Session") -> EventLog:
                after.append(last_events(session))
                return self._log_ending_with(after[-1])

            answer = self._answer_ending_with(lambda: after[0])
            self.session = await self._turn.finish(delta, log_of, answer)
        except SessionError as error:
            goes_on = isinstance(error, SessionMovedError | StoreUnreachableError)
            if self._journal is not None and goes_on:
                raise
            self.error = session_error(error)
            return self._formatter.error(self.error)
        except Exception as error:  # the response has begun: its connection must not break
            logger.error("could not end a turn of session %s: %r", self._turn.session_id, error)
            self.error = turn_failed()
            return self._formatter.error(self.error)
        self.error = failed
        return last_events(self.session)

"""States in hand: a client keeps the state after an answer itself, and sends it with what is new.

It is a session's snapshot, in base64. Nothing of it stays in the server, so that any server of the
same model goes on from it.
"""

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

from cottention.engine.errors import NonFiniteStateError, SnapshotError, StateTooLargeError
from cottention.engine.outputs import FinishReason
from cottention.server.generation.json_pieces import compact
from cottention.server.generation.output_stream import OutputDelta, OutputStream
from cottention.server.generation.sse import EventFormatter
from cottention.server.http.errors import (
    SESSION_ERRORS,
    ApiError,
    bad_snapshot,
    engine_failed,
)

if TYPE_CHECKING:  # they bring torch with them, which the server does not know
    from cottention.engine.sessions.manager import SessionManager
    from cottention.engine.state.session_state import SessionState

UNRETURNABLE: dict[type[Exception], str] = {
    NonFiniteStateError: "the state after these tokens has values that are not finite",
    StateTooLargeError: "the state after these tokens is larger than --max-stored-state",
}


def encoded_length(num_bytes: int) -> int:
    """Characters of so many bytes in base64."""
    return 4 * ((num_bytes + 2) // 3)


def read_state(
    text: str,
    sessions: "SessionManager",
    max_bytes: int,
    check: Callable[["SessionState"], None],
) -> "SessionState":
    """The state that a client sends.

    check: raises an error of its choice for a state that cannot be used here. Raises ApiError: 413
    for more than `max_bytes`, 409 for a state of another model, 400 for what is none.
    """
    if len(text) > encoded_length(max_bytes):
        message = f"state has more than the {max_bytes} bytes that one of this model may have"
        raise ApiError(413, message, param="state", code="body_too_large")
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # ValueError: other characters than those of ASCII
        message = "state must be base64, as it was returned"
        raise ApiError(400, message, param="state", code="bad_snapshot") from None
    try:
        return sessions.read_snapshot(raw, check)
    except SnapshotError as error:
        raise bad_snapshot(error, "state") from None


class StateWriter:
    """Writes the states of answers as clients get them."""

    def __init__(self, sessions: "SessionManager") -> None:
        self._sessions = sessions

    async def write(self, state: "SessionState | None") -> str | None:
        """A state in base64; None for an answer that was cut, which has none. Raises ApiError."""
        return None if state is None else await asyncio.to_thread(self._write, state)

    def _write(self, state: "SessionState") -> str:
        try:
            raw = self._sessions.snapshot(state)
        except (NonFiniteStateError, StateTooLargeError) as error:
            status, code = SESSION_ERRORS[type(error)]
            message = f"{UNRETURNABLE[type(error)]}: it cannot be returned"
            raise ApiError(status, message, param="return_state", code=code) from None
        return base64.b64encode(raw).decode()


class StateEvents:
    """The events of an answer whose last chunk has the state after it."""

    def __init__(
        self, stream: OutputStream, formatter: EventFormatter, writer: StateWriter
    ) -> None:
        """stream: of one choice."""
        self._stream = stream
        self._formatter = formatter
        self._writer = writer

    async def events(self, idle_seconds: float) -> AsyncIterator[bytes]:
        """As EventSource.events."""
        stream, formatter = self._stream, self._formatter
        while stream.has_more:
            deltas = await stream.take(idle_seconds)
            chunks = await formatter.chunks(deltas)
            ended = [delta for delta in deltas.values() if delta.finish_reason is not None]
            text = await self._end(ended[0], chunks) if ended else formatter.frame(chunks)
            yield text.encode()

    async def _end(self, delta: OutputDelta, chunks: Sequence[str]) -> str:
        """The last events, with the state in the last chunk of the text."""
        formatter = self._formatter
        try:
            if delta.finish_reason is FinishReason.ERROR:
                raise engine_failed()
            state = await self._writer.write(delta.state)
        except ApiError as error:
            return formatter.frame(chunks) + formatter.error(error)
        *before, last = chunks
        end = formatter.frame([last], f',"state":{compact(state)}', is_end=True)
        return formatter.frame(before) + end + formatter.end()

    def close(self) -> None:
        """Cancel what has not ended."""
        self._stream.close()

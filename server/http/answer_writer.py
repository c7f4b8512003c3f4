"""Parts of a streamed answer that go to the connection past the tasks that answer.

ASGI's `send` passes through every middleware, and who awaits it is a task that has to be woken:
for a token of a few bytes that takes longer than writing it.
"""

from typing import TYPE_CHECKING, Any

from starlette.types import Scope

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

MAX_WAITING = 16 * 1024
"""Characters that wait for `flush` at most: it is only by sending that a slow client is noticed."""

_EXTENSION = "cottention.answer_writer"


class AnswerWriter:
    """Writes parts of one answer, which `send` has begun and ends."""

    def __init__(self, cycle: "RequestResponseCycle") -> None:
        self._cycle = cycle
        self._parts: list[str] = []
        self._num_characters = 0

    @property
    def is_ready(self) -> bool:
        """Whether there is such an answer, in chunked coding, and its client reads."""
        cycle = self._cycle
        is_open = cycle.response_started and not (cycle.response_complete or cycle.disconnected)
        return is_open and cycle.chunked_encoding is True and not cycle.flow.write_paused

    def write(self, part: str) -> None:
        """Write a part of the body, where the writer is ready; `flush` before anybody else does."""
        self._parts.append(part)
        self._num_characters += len(part)
        if self._num_characters > MAX_WAITING:
            self.flush()

    def flush(self) -> None:
        """Send all parts that wait, in one system call."""
        if body := "".join(self._parts).encode():
            self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        self._parts.clear()
        self._num_characters = 0


def answer_writer_of(scope: Scope) -> AnswerWriter | None:
    """That of a request; None where the answer does not go to its connection, or to another."""
    writer: AnswerWriter | None = scope.get("extensions", {}).get(_EXTENSION, {}).get("writer")
    return writer


def extensions_with(writer: AnswerWriter) -> dict[str, dict[object, object]]:
    """The "extensions" of the scope of a request that has this writer."""
    return {_EXTENSION: {"writer": writer}}


def without_answer_writer(scope: Scope) -> dict[str, Any]:
    """The scope of a request whose answer has to pass through `send` as a whole."""
    return {**scope, "extensions": {}}

"""What one HTTP request reads of the engine: the unread pieces of all its choices.

Owns the merging of what a reader has not read yet, so that a slow one costs its text and nothing
per token. Lives on the event loop alone; knows no HTTP and no engine.

What an output takes while nobody reads it. Does not know who should.
"""

import asyncio
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cottention.engine.outputs import FinishReason, Output, TokenLogprob

if TYPE_CHECKING:
    from cottention.engine.state.session_state import SessionState


class OutputStreamClosed(Exception):
    """The reader went away, or was sent away; there is nothing left to read."""


@dataclass(slots=True)
class TokenDeltas:
    """Unread ids of one choice, and how likely they were where that was asked for."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprob | None] = ()

    def add(self, output: Output) -> None:
        """Append one step's ids."""
        self.ids += output.token_ids
        self.logprobs += output.logprobs
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs

    def merge(self, later: "TokenDeltas") -> None:
        """Append what was read later."""
        self.ids += later.ids
        self.logprobs += later.logprobs
        self.prompt_logprobs = later.prompt_logprobs or self.prompt_logprobs


@dataclass(slots=True)
class OutputDelta:
    """Unread text of one choice, merged from however many steps it took; its ids where wanted.

    state: of a session after its turn, where that has ended by itself.
    context_start: index of the oldest token that is remembered.
    """

    tokens: TokenDeltas | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    state: "SessionState | None" = None
    context_start: int = 0
    _text: io.StringIO = field(default_factory=io.StringIO)

    @property
    def text(self) -> str:
        """All of it."""
        return self._text.getvalue()

    def add(self, output: Output) -> None:
        """Append one step's output; a choice ends once."""
        self._text.write(output.text)
        if self.tokens is not None:
            self.tokens.add(output)
        if self.finish_reason is None:
            self.finish_reason = output.finish_reason
            self.stop_reason = output.stop_reason
            self.state = output.state
            self.context_start = output.context_start

    def merge(self, later: "OutputDelta") -> None:
        """Append what was read later of the same choice."""
        self._text.write(later.text)
        if later.tokens is not None:
            self.tokens = self.tokens or TokenDeltas()
            self.tokens.merge(later.tokens)
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason
        self.state, self.context_start = later.state, later.context_start


class OutputStream:
    """The pieces of `num_choices` choices, from first to last; `close` when done, in any case."""

    def __init__(
        self,
        num_choices: int,
        on_close: Callable[["OutputStream"], None],
        on_take: Callable[["OutputStream"], None],
        *,
        keeps_tokens: bool = False,
        max_unread: int | None = None,
    ) -> None:
        """max_unread: bytes after which it is full and those in `paused` wait; None: never."""
        self._keeps_tokens = keeps_tokens
        self._max_unread = max_unread
        self._num_unread = 0
        self.paused: set[str] = set()
        self._unread: dict[int, OutputDelta] = {}
        self._unfinished = set(range(num_choices))
        self._on_close = on_close
        self._on_take = on_take
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()
        self._closed = False
        self.timer: asyncio.TimerHandle | None = None
        self.num_generated = self.num_cached = 0
        self.started: float | None = None
        self.first_token: float | None = None
        self.reasons: list[FinishReason] = []

    @property
    def has_more(self) -> bool:
        """Whether anything is unread or still to come."""
        return bool(self._unread or self._unfinished)

    @property
    def is_closed(self) -> bool:
        """Whether nobody reads any more."""
        return self._closed

    @property
    def is_finished(self) -> bool:
        """Whether every choice has ended, read or not."""
        return not self._unfinished

    @property
    def is_full(self) -> bool:
        """Whether the reader is so far behind that no more should come."""
        return self._max_unread is not None and self._num_unread > self._max_unread

    def deliver(self, choice: int, output: Output) -> None:
        """Take one output of the engine for the choice of this number."""
        self.num_generated += len(output.token_ids)
        self.num_cached += output.num_cached
        if output.text or output.finish_reason or self._keeps_tokens:
            self._add(choice, output)

    def fail(self) -> None:
        """End every unfinished choice with an error: the engine is gone."""
        for choice in sorted(self._unfinished):
            self._add(choice, Output("", choice, "", (), FinishReason.ERROR))

    async def take(self, idle_seconds: float | None = None) -> dict[int, OutputDelta]:
        """All unread pieces by choice, waiting for the first; empty after `idle_seconds` of none.

        Raises ReadingClosed.
        """
        if not self._changed.is_set():
            await self._arrives(idle_seconds)
        if self._closed:
            raise OutputStreamClosed
        self._changed.clear()
        unread, self._unread = self._unread, {}
        self._num_unread = 0
        self._on_take(self)
        return unread

    async def wait_ended(self) -> None:
        """Return when every choice has ended, one has failed, or the reading is closed."""
        await self._ended.wait()

    def close(self) -> None:
        """Stop reading; what has not ended is cancelled. May be called again."""
        if not self._closed:
            self._closed = True
            self._changed.set()
            self._ended.set()
            self._on_close(self)

    async def _arrives(self, idle_seconds: float | None) -> None:
        """Return at the first change, or as if there had been one; asyncio.timeout costs more."""
        if idle_seconds is None:
            await self._changed.wait()
            return
        timer = asyncio.get_running_loop().call_later(idle_seconds, self._changed.set)
        try:
            await self._changed.wait()
        finally:
            timer.cancel()

    def _add(self, choice: int, output: Output) -> None:
        piece = self._unread.get(choice)
        if piece is None:
            piece = self._unread[choice] = OutputDelta(
                TokenDeltas() if self._keeps_tokens else None
            )
        piece.add(output)
        if self._max_unread is not None:
            self._num_unread += size_of(output)
        if output.finish_reason:
            self._unfinished.discard(choice)
            self.reasons.append(output.finish_reason)
            if self.is_finished or output.finish_reason is FinishReason.ERROR:
                self._ended.set()
        self._changed.set()


ID_BYTES = 8
LOGPROB_BYTES = 128


def size_of(output: Output) -> int:
    """Bytes, about."""
    text = output.text
    size = len(text) if text.isascii() else len(text.encode("utf-8", errors="replace"))
    if output.logprobs:
        size += LOGPROB_BYTES * sum(1 + len(each.top) for each in output.logprobs)
    return size + ID_BYTES * len(output.token_ids)

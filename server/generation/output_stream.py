"""The stream of outputs of one HTTP request: `deliver` puts engine outputs in, `take` reads them.

Unread outputs of a choice are merged into one `OutputDelta`, so that a slow reader costs the memory
of its unread text, not an object per token. A reader that waits is not woken for every token: where
there is a `Writer`, `write` leaves the output to that. A stream runs on the event loop.
"""

import asyncio
import io
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Self

from cottention.engine.encoding import Encoded
from cottention.engine.outputs import FinishReason, Output, TokenLogprob

if TYPE_CHECKING:
    from cottention.engine.state.session_state import SessionState


class OutputStreamClosed(Exception):
    """The stream was closed by its reader or by the server; there is nothing left to read."""


@dataclass(slots=True)
class TokenDeltas:
    """Unread token ids of one choice, with log-probabilities where requested."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprob | None] = ()

    def add(self, output: Output) -> None:
        """Append the tokens of one step."""
        self.ids += output.token_ids
        self.logprobs += output.logprobs
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs

    def merge(self, later: "TokenDeltas") -> None:
        """Append the tokens of a later delta."""
        self.ids += later.ids
        self.logprobs += later.logprobs
        self.prompt_logprobs = later.prompt_logprobs or self.prompt_logprobs


@dataclass(slots=True)
class OutputDelta:
    """Unread output of one choice, merged from any number of steps.

    tokens: None where only text is needed. num_tokens: their number, counted in either case.
    state: of the session after its turn, if the turn has ended by itself.
    context_start: index of the oldest token that the model's state still covers.
    encoded: an encoder's answer.
    """

    tokens: TokenDeltas | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    state: "SessionState | None" = None
    context_start: int = 0
    num_tokens: int = 0
    encoded: Encoded | None = None
    _text: io.StringIO = field(default_factory=io.StringIO)

    @property
    def text(self) -> str:
        """The merged text."""
        return self._text.getvalue()

    @classmethod
    def of(cls, output: Output, num_tokens: int, *, keeps_token_ids: bool) -> Self:
        """That of one output, with so many tokens."""
        delta = cls(TokenDeltas() if keeps_token_ids else None)
        delta.add(output)
        delta.num_tokens = num_tokens
        return delta

    def add(self, output: Output) -> None:
        """Append the output of one step; the first finish reason is kept."""
        self._text.write(output.text)
        self.num_tokens += len(output.token_ids)
        if self.tokens is not None:
            self.tokens.add(output)
        if self.finish_reason is None:
            self.finish_reason = output.finish_reason
            self.stop_reason = output.stop_reason
            self.state = output.state
            self.context_start = output.context_start
            self.encoded = output.encoded

    def merge(self, later: "OutputDelta") -> None:
        """Append a later delta of the same choice."""
        self._text.write(later.text)
        self.num_tokens += later.num_tokens
        if later.tokens is not None:
            self.tokens = self.tokens or TokenDeltas()
            self.tokens.merge(later.tokens)
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason
        self.state, self.context_start = later.state, later.context_start


class Writer(Protocol):
    """Sends outputs in place of a stream's reader."""

    def write(self, choice: int, output: Output, num_tokens: int) -> bool:
        """Take an output, to be sent with the next `send`; False where that is not possible.

        num_tokens: those of the output, and of the choice's before it that had no text.
        """
        ...

    def send(self) -> None:
        """Send what has been written."""
        ...


class OutputStream:
    """Outputs of `num_choices` choices. Whoever opens a stream must `close` it."""

    def __init__(
        self,
        num_choices: int,
        on_close: Callable[["OutputStream"], None],
        on_take: Callable[["OutputStream"], None],
        *,
        keeps_token_ids: bool = False,
        max_unread_bytes: int | None = None,
        keeps_apart: bool = False,
    ) -> None:
        """keeps_apart: outputs are not merged but read one by one, so that a run of the same ids
        has the same deltas. max_unread_bytes: the stream `is_full` above it; None: never.

        The dispatcher keeps the ids of its prompts that wait for a reader in `paused`, and in
        `cancel_reason` why its prompts were cancelled: the engine forgets a cancellation of a
        prompt that it does not know yet. was_cancelled: by its id. on_closed: called by `close`.
        writer: has outputs in place of the reader, where that is possible.
        """
        self.keeps_token_ids = keeps_token_ids
        self._max_unread_bytes = max_unread_bytes
        self._num_unread_bytes = 0
        self.paused: set[str] = set()
        self.cancel_reason: FinishReason | None = None
        self.was_cancelled = False
        self.on_closed: Callable[[], None] | None = None
        self.writer: Writer | None = None
        self._unread: dict[int, OutputDelta] = {}
        self._apart: deque[tuple[int, OutputDelta, int]] | None = deque() if keeps_apart else None
        self._num_without_text: Counter[int] = Counter()
        self._unfinished = set(range(num_choices))
        self._on_close = on_close
        self._on_take = on_take
        self._changed = asyncio.Event()
        self._has_waiting_reader = False
        self._idle_timer: asyncio.TimerHandle | None = None
        self._written_at = 0.0
        self._ended = asyncio.Event()
        self._closed = False
        self.timer: asyncio.TimerHandle | None = None
        self.num_generated = self.num_cached = 0
        self.opened = time.monotonic()
        self.started: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.reasons: list[FinishReason] = []

    @property
    def has_more(self) -> bool:
        """Whether there is unread or future output."""
        return bool(self._unread or self._apart or self._unfinished)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def is_finished(self) -> bool:
        """Whether every choice has ended, read or not."""
        return not self._unfinished

    @property
    def is_full(self) -> bool:
        """Whether there is so much unread output that generation should pause."""
        return (
            self._max_unread_bytes is not None and self._num_unread_bytes > self._max_unread_bytes
        )

    def deliver(self, choice: int, output: Output) -> None:
        """Add an engine output to the choice of this number."""
        self.num_generated += len(output.token_ids)
        self.num_cached += output.num_cached
        if output.text or output.finish_reason or self.keeps_token_ids:
            self._add(choice, output)
        else:  # counted with the choice's next text
            self._num_without_text[choice] += len(output.token_ids)

    def write(self, choice: int, output: Output) -> bool:
        """Leave an engine output to the writer; False where it is to be delivered to the reader.

        The writer has it only while the reader waits in `take`: nothing overtakes what that has
        taken. The last output of a choice is the reader's, who ends the answer.
        """
        writer = self.writer
        is_readers = not self._has_waiting_reader or self._changed.is_set()
        if writer is None or is_readers or output.finish_reason is not None:
            return False
        num_tokens = len(output.token_ids)
        num_told = num_tokens
        if not output.text and not self.keeps_token_ids:
            self._num_without_text[choice] += num_tokens
        else:
            if self._num_without_text:
                num_told += self._num_without_text[choice]
            if not writer.write(choice, output, num_told):
                return False
            if self._num_without_text:
                del self._num_without_text[choice]
        self.num_generated += num_tokens
        self.num_cached += output.num_cached
        return True

    def send(self) -> None:
        """Send what the writer has been left."""
        if self.writer is not None:
            self._written_at = time.monotonic()
            self.writer.send()

    def fail(self) -> None:
        """End every unfinished choice with FinishReason.ERROR: the engine has stopped."""
        for choice in sorted(self._unfinished):
            self._add(choice, Output("", choice, "", (), FinishReason.ERROR))
        self._changed.set()

    async def take(self, idle_seconds: float | None = None) -> dict[int, OutputDelta]:
        """All unread output by choice; waits for the first. Empty after `idle_seconds` of none.

        Raises OutputStreamClosed.
        """
        if not self._changed.is_set():
            await self._wait_changed(idle_seconds)
        if self._closed:
            raise OutputStreamClosed
        self._changed.clear()
        if self._apart is not None:
            return self._take_one(self._apart)
        return self._take_all()

    def _take_all(self) -> dict[int, OutputDelta]:
        unread, self._unread = self._unread, {}
        self._num_unread_bytes = 0
        self._on_take(self)
        return unread

    def _take_one(self, apart: "deque[tuple[int, OutputDelta, int]]") -> dict[int, OutputDelta]:
        if not apart:
            return {}
        choice, delta, num_bytes = apart.popleft()
        self._num_unread_bytes -= num_bytes
        if apart:
            self._changed.set()
        if not self.is_full:
            self._on_take(self)
        return {choice: delta}

    async def wait_ended(self) -> None:
        """Return when every choice has ended, one has failed, or the stream is closed."""
        await self._ended.wait()

    def close(self) -> None:
        """Stop reading and cancel what has not ended. Idempotent."""
        if not self._closed:
            self._closed = True
            self._changed.set()
            self._ended.set()
            self._on_close(self)
            if self.on_closed is not None:
                self.on_closed()

    async def _wait_changed(self, idle_seconds: float | None) -> None:
        """Wait for a change, for at most `idle_seconds`; cheaper than asyncio.timeout."""
        self._has_waiting_reader = True
        if idle_seconds is not None:
            self._wait_idle(idle_seconds, idle_seconds)
        try:
            await self._changed.wait()
        finally:
            self._has_waiting_reader = False
            if self._idle_timer is not None:
                self._idle_timer.cancel()
                self._idle_timer = None

    def _wait_idle(self, seconds: float, idle_seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._idle_timer = loop.call_later(seconds, self._on_idle, idle_seconds)

    def _on_idle(self, idle_seconds: float) -> None:
        """Wake the reader, unless the writer has written in the meantime."""
        rest = self._written_at + idle_seconds - time.monotonic()
        if rest > 0:
            self._wait_idle(rest, idle_seconds)
        else:
            self._changed.set()

    def _add(self, choice: int, output: Output) -> None:
        delta = self._unread.get(choice) if self._apart is None else None
        if delta is None:
            delta = OutputDelta(TokenDeltas() if self.keeps_token_ids else None)
            if self._apart is None:
                self._unread[choice] = delta
            else:
                self._apart.append((choice, delta, approximate_bytes(output)))
        delta.add(output)
        if self._num_without_text:
            delta.num_tokens += self._num_without_text.pop(choice, 0)
        if self._max_unread_bytes is not None:
            self._num_unread_bytes += approximate_bytes(output)
        if output.finish_reason:
            self._unfinished.discard(choice)
            self.reasons.append(output.finish_reason)
            if self.is_finished or output.finish_reason is FinishReason.ERROR:
                self._ended.set()
        self._changed.set()


ID_BYTES = 8
LOGPROB_BYTES = 128


def approximate_bytes(output: Output) -> int:
    """Approximate memory of an unread output, in bytes."""
    text = output.text
    size = len(text) if text.isascii() else len(text.encode("utf-8", errors="replace"))
    if output.logprobs:
        size += LOGPROB_BYTES * sum(1 + len(each.top) for each in output.logprobs)
    return size + ID_BYTES * len(output.token_ids)

"""One response from its first token to its end: its events as they come, and what is kept of it."""

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cottention.engine.errors import SessionError, SessionMovedError, StoreUnreachableError
from cottention.engine.outputs import FinishReason
from cottention.server.generation.choice_format import TokenNames, chat_logprobs
from cottention.server.generation.output_stream import OutputDelta, OutputStream
from cottention.server.generation.request import GenerationRequest
from cottention.server.generation.tools.calls import CallReader
from cottention.server.http.errors import ApiError, engine_failed, session_error
from cottention.server.responses.values import INTERRUPTED, ResponseStore, StoredResponse
from cottention.server.responses.writer import Event, ResponseWriter, Status, event_text
from cottention.server.schemas.responses import JsonObject
from cottention.server.sessions.journal import TurnJournal
from cottention.server.sessions.store_threads import in_store_thread

if TYPE_CHECKING:  # they import torch, which the server must not load
    from cottention.engine.sessions.types import AdoptedTurn, SessionAnswer, Turn
    from cottention.engine.state.session_state import SessionState
    from cottention.engine.text.base import BaseTokenizer

logger = logging.getLogger("cottention")

ENDS: dict[FinishReason, tuple[Status, str | None]] = {
    FinishReason.STOP: ("completed", None),
    FinishReason.LENGTH: ("incomplete", "max_output_tokens"),
    FinishReason.TIMEOUT: ("incomplete", "timeout"),
    FinishReason.SLOW_READER: ("incomplete", "slow_reader"),
    FinishReason.ABORT: ("cancelled", None),
    FinishReason.ERROR: ("failed", None),
}
"""Status and reason of a response by how its text has ended."""


AnswerEndingWith = Callable[[str], "SessionAnswer | None"]
"""The answer of an idempotency key that is stored with a response whose last events are these."""


@dataclass(frozen=True, slots=True)
class Keeping:
    """Where a response is kept. empty: the state where it has left none."""

    store: ResponseStore
    owner: str
    items: list[JsonObject]
    empty: "SessionState"


class ResponseRun:
    """A response whose generation has begun. error: why it failed, or could not be stored.

    is_answered: the answer of its idempotency key is stored with it.
    """

    def __init__(
        self,
        stream: OutputStream,
        request: GenerationRequest,
        writer: ResponseWriter,
        tokenizer: "BaseTokenizer",
    ) -> None:
        self._stream = stream
        self._request = request
        self._writer = writer
        self._names = TokenNames(tokenizer, by_number=False)
        calls = request.output.calls
        self._reader = None if calls is None else CallReader(calls)
        self._kept: Keeping | None = None
        self._answer: AnswerEndingWith = lambda _: None
        self._turn: Turn | None = None
        self._journal: TurnJournal | None = None
        self._known, self._num_known = "", 0
        self.error: ApiError | None = None
        self.is_answered = False

    def keep(self, kept: Keeping) -> None:
        """Have the response stored before its last event."""
        self._kept = kept

    def answer_with(self, answer: AnswerEndingWith) -> None:
        """Have the answer of its idempotency key stored with it, unless it fails."""
        self._answer = answer

    async def keep_begun(self, start: "SessionState") -> "Turn":
        """Store it as it is now, so that it is found whatever becomes of the server.

        start: the state that it goes on from. Raises ApiError and SessionError. `end` stores what
        became of it, unless `leave`, `forget` or `settle` ends it.
        """
        kept = self._keeping
        stored = StoredResponse(self._writer.snapshot(), kept.items, [], can_continue=False)
        self._turn = await in_store_thread(kept.store.begin, kept.owner, stored, start)
        return self._turn

    def journal_with(self, journal: TurnJournal) -> None:
        """Have it journaled: it goes on also without its server."""
        self._journal = journal

    def go_on(self, adopted: "AdoptedTurn") -> None:
        """Go on with a response that another server has begun."""
        self._turn = adopted.turn
        self._known, self._num_known = adopted.events.decode(), len(adopted.ids)

    async def leave(self, *, hands_over: bool) -> None:
        """End it here, and leave it to another server as it is. Raises StoreUnavailableError.

        hands_over: as SessionManager.leave has it.
        """
        assert self._turn is not None
        turn, self._turn = self._turn, None
        await in_store_thread(lambda: self._keeping.store.leave(turn, hands_over=hands_over))

    async def forget(self) -> None:
        """Forget a response that was begun, and told to nobody."""
        if self._turn is not None:
            with contextlib.suppress(SessionError):
                await in_store_thread(self._keeping.store.abandon, self._turn)

    async def settle(self) -> None:
        """Note of a response that was begun and has not ended that it has failed."""
        if self._turn is None:
            return
        error = {"code": "server_error", "message": INTERRUPTED}
        self._writer.end("failed", int(time.time()), {"error": error})
        kept, cuts = self._keeping, [*self._writer.cuts]
        stored = StoredResponse(self._writer.snapshot(), kept.items, cuts, can_continue=False)
        with contextlib.suppress(SessionError):
            await in_store_thread(self._store, stored, kept.empty, None)

    async def events(self, idle_seconds: float) -> AsyncIterator[bytes]:
        """As EventSource.events."""
        async for text in self.texts(idle_seconds):
            yield text.encode()

    def close(self) -> None:
        """Cancel it if it has not ended."""
        self._stream.close()

    async def texts(self, idle_seconds: float | None = None) -> AsyncIterator[str]:
        """Its events; an empty text after `idle_seconds` without any. OutputStreamClosed.

        SessionMovedError, StoreUnreachableError: the response, which is journaled, goes on
        elsewhere.
        """
        yield _joined(self._writer.begin())
        if self._known:
            has_logprobs = self._request.output.logprobs is not None
            self._writer.repeat(self._known, has_logprobs=has_logprobs)
            yield self._known
        while True:
            deltas = await self._stream.take(idle_seconds)
            if not deltas:
                yield ""
                continue
            [delta] = deltas.values()
            if delta.finish_reason is None and self._num_known > 0:
                self._num_known -= delta.num_tokens
                if self._reader is not None:
                    self._reader.read(delta.text, is_last=False)
                continue
            events = self.add(delta)
            if delta.finish_reason is not None:
                if self._journal is not None:
                    await self._journal.wait_held()
                yield _joined(events + await self.end(delta, events))
                return
            text = _joined(events)
            if self._journal is not None:
                assert delta.tokens is not None
                await self._journal.tell(delta.tokens.ids, text.encode())
            if text:
                yield text

    def add(self, delta: OutputDelta) -> list[Event]:
        """The events of some more output."""
        logprobs = None
        if self._request.output.logprobs is not None and delta.tokens is not None:
            logprobs = list(chat_logprobs(delta.tokens.logprobs, self._names)["content"].values)
        is_last = delta.finish_reason is not None
        if self._reader is None:
            is_empty = not delta.text and not logprobs and self._writer.cuts
            return [] if is_empty else self._writer.add_text(delta.text, logprobs)
        events: list[Event] = []
        for part in self._reader.read(delta.text, is_last=is_last):
            if "content" in part:
                events += self._writer.add_text(part["content"], logprobs)
                logprobs = [] if logprobs else logprobs
                continue
            [call] = part["tool_calls"]
            if "id" in call:
                events += self._writer.begin_call(call["id"], call["function"]["name"])
            else:
                events += self._writer.add_arguments(call["function"]["arguments"])
        if is_last and not self._writer.response["output"]:
            events += self._writer.add_text("", logprobs)
        return events

    async def end(self, delta: OutputDelta, before: Sequence[Event] = ()) -> list[Event]:
        """The last events, when the response has been stored if it is kept.

        before: those that are told together with them. Raises as `texts`.
        """
        assert delta.finish_reason is not None
        status, reason = ENDS[delta.finish_reason]
        fields: JsonObject = {"usage": self._usage()}
        if reason is not None:
            fields["incomplete_details"] = {"reason": reason}
        if status == "failed":
            self.error = engine_failed()
            fields["error"] = _described(self.error)
        events = self._writer.end(status, int(time.time()), fields)
        if self._kept is None:
            return events
        kept, state = self._kept, delta.state
        stored = StoredResponse(
            self._writer.snapshot(), kept.items, [*self._writer.cuts], state is not None
        )
        answer = None if self.error else self._answer(_joined([*before, *events]))
        try:
            is_durable = await in_store_thread(
                self._store, stored, kept.empty if state is None else state, answer
            )
        except ApiError as error:
            self.error = error
        except SessionError as error:
            if self._goes_on(error):
                raise
            self.error = session_error(error)
        except Exception as error:  # the answer has begun: its connection must not break
            logger.error("could not store response %s: %r", self._writer.response["id"], error)
            self.error = ApiError(500, "the response could not be stored; see the server's log")
        else:
            self.is_answered = is_durable and answer is not None
            return events
        self._writer.response |= {"status": "failed", "error": _described(self.error)}
        last = {"type": "response.failed", "response": self._writer.snapshot()}
        return [*events[:-1], events[-1] | last]

    def _store(
        self, stored: StoredResponse, state: "SessionState", answer: "SessionAnswer | None"
    ) -> bool:
        """In a thread; as ResponseStore.end. Raises ApiError and SessionError."""
        kept = self._keeping
        if self._turn is None:
            return kept.store.save(kept.owner, stored, state, answer)
        try:
            is_durable = kept.store.end(self._turn, stored, state, answer)
        except Exception as error:
            if not self._goes_on(error):
                with contextlib.suppress(SessionError):
                    kept.store.abandon(self._turn)
                self._turn = None
            raise
        self._turn = None
        return is_durable

    def _goes_on(self, error: Exception) -> bool:
        """Whether the response goes on elsewhere, or later, after this error at its end."""
        is_left = isinstance(error, SessionMovedError | StoreUnreachableError)
        return self._journal is not None and is_left

    @property
    def _keeping(self) -> Keeping:
        assert self._kept is not None
        return self._kept

    def _usage(self) -> JsonObject:
        """All tokens that the answer depends on; those of the state were not read again."""
        num_cached = self._request.num_held + self._stream.num_cached
        num_input = self._request.num_held + self._request.num_prompt_tokens
        num_output = self._stream.num_generated
        return {
            "input_tokens": num_input,
            "input_tokens_details": {"cached_tokens": num_cached, "cache_write_tokens": 0},
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": num_input + num_output,
        }


def _joined(events: Sequence[Event]) -> str:
    return "".join(map(event_text, events))


def _described(error: ApiError) -> JsonObject:
    code = "rate_limit_exceeded" if error.status == 429 else "server_error"
    return {"code": code, "message": str(error)}

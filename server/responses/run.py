"""One response from its first token to its end: its events as they come, and what is kept of it."""

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from cottention.engine.errors import SessionError
from cottention.engine.outputs import FinishReason
from cottention.server.generation.choice_format import TokenNames, chat_logprobs
from cottention.server.generation.output_stream import OutputDelta, OutputStream
from cottention.server.generation.request import GenerationRequest
from cottention.server.generation.tools.calls import CallReader
from cottention.server.http.errors import ApiError, engine_failed, session_error
from cottention.server.responses.values import ResponseStore, StoredResponse
from cottention.server.responses.writer import Event, ResponseWriter, Status, event_text
from cottention.server.schemas.responses import JsonObject
from cottention.server.sessions.store_threads import in_store_thread

if TYPE_CHECKING:  # they import torch, which the server must not load
    from cottention.engine.sessions.types import Turn
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


class ResponseRun:
    """A response whose generation has begun. error: why it failed, or could not be stored."""

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
        self._kept: tuple[ResponseStore, str, list[JsonObject], SessionState] | None = None
        self._turn: Turn | None = None
        self.error: ApiError | None = None

    def keep(
        self, store: ResponseStore, owner: str, items: list[JsonObject], empty: "SessionState"
    ) -> None:
        """Have the response stored before its last event. empty: the state where there is none."""
        self._kept = store, owner, items, empty

    async def keep_begun(self) -> None:
        """Store it as it is now, so that it is found whatever becomes of the server.

        Raises ApiError and SessionError. `end` stores what became of it.
        """
        assert self._kept is not None
        store, owner, items, empty = self._kept
        stored = StoredResponse(self._writer.snapshot(), items, [], can_continue=False)
        self._turn = await in_store_thread(store.begin, owner, stored, empty)

    async def events(self, idle_seconds: float) -> AsyncIterator[bytes]:
        """As EventSource.events."""
        async for text in self.texts(idle_seconds):
            yield text.encode()

    def close(self) -> None:
        """Cancel it if it has not ended."""
        self._stream.close()

    async def texts(self, idle_seconds: float | None = None) -> AsyncIterator[str]:
        """Its events; an empty text after `idle_seconds` without any. OutputStreamClosed."""
        yield _joined(self._writer.begin())
        while True:
            deltas = await self._stream.take(idle_seconds)
            if not deltas:
                yield ""
                continue
            [delta] = deltas.values()
            events = self.add(delta)
            if delta.finish_reason is not None:
                yield _joined(events + await self.end(delta))
                return
            if events:
                yield _joined(events)

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

    async def end(self, delta: OutputDelta) -> list[Event]:
        """The last events, when the response has been stored if it is kept."""
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
        _, _, items, empty = self._kept
        state = delta.state
        stored = StoredResponse(
            self._writer.snapshot(), items, [*self._writer.cuts], state is not None
        )
        try:
            await in_store_thread(self._store, stored, empty if state is None else state)
        except ApiError as error:
            self.error = error
        except SessionError as error:
            self.error = session_error(error)
        except Exception as error:  # the answer has begun: its connection must not break
            logger.error("could not store response %s: %r", self._writer.response["id"], error)
            self.error = ApiError(500, "the response could not be stored; see the server's log")
        else:
            return events
        self._writer.response |= {"status": "failed", "error": _described(self.error)}
        last = {"type": "response.failed", "response": self._writer.snapshot()}
        return [*events[:-1], events[-1] | last]

    def _store(self, stored: StoredResponse, state: "SessionState") -> None:
        """In a thread. Raises ApiError and SessionError."""
        assert self._kept is not None
        store, owner, _, _ = self._kept
        if self._turn is None:
            store.save(owner, stored, state)
            return
        try:
            store.end(self._turn, stored, state)
        except Exception:
            with contextlib.suppress(SessionError):
                store.abandon(self._turn)
            raise

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

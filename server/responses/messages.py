"""Answers in Anthropic's shapes: the message, and the events of its stream."""

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from cottention.engine.outputs import FinishReason, Output
from cottention.server.generation.json_pieces import compact
from cottention.server.generation.output_stream import OutputDelta, OutputStream
from cottention.server.generation.request import GenerationRequest
from cottention.server.generation.tools.calls import CallReader
from cottention.server.http.answer_writer import AnswerWriter
from cottention.server.http.errors import ApiError, engine_failed
from cottention.server.schemas.responses import JsonObject

STOP_REASONS = {
    FinishReason.STOP: "end_turn",
    FinishReason.LENGTH: "max_tokens",
}
CUT = "pause_turn"
"""Of an answer that was ended from outside: its text can be sent again to go on with it."""

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(status: int, message: str, request_id: str | None = None) -> JsonObject:
    """An error in Anthropic's form."""
    default = "api_error" if status >= 500 else "invalid_request_error"
    error = {"type": ERROR_TYPES.get(status, default), "message": message}
    return {"type": "error", "error": error, "request_id": request_id}


class MessageWriter:
    """A message, and its events as its output comes."""

    def __init__(self, message_id: str, model: str, request: GenerationRequest) -> None:
        self._request = request
        calls = request.output.calls
        self._reader = None if calls is None else CallReader(calls)
        self._arguments = ""
        self._is_open = False
        self.message: JsonObject = {
            "id": message_id,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(0, 0),
        }

    def begin(self) -> list[JsonObject]:
        """The first event."""
        return [{"type": "message_start", "message": {**self.message, "content": []}}]

    def add(self, delta: OutputDelta) -> list[JsonObject]:
        """The events of some more output."""
        if self._reader is None:
            return self._text(delta.text)
        events: list[JsonObject] = []
        is_last = delta.finish_reason is not None
        for part in self._reader.read(delta.text, is_last=is_last):
            if "content" in part:
                events += self._text(part["content"])
                continue
            [call] = part["tool_calls"]
            if "id" in call:
                function = call["function"]
                block = {"type": "tool_use", "id": call["id"], "name": function["name"]}
                events += [*self._close(), *self._open(block | {"input": {}})]
            else:
                text = call["function"]["arguments"]
                self._arguments += text
                events += self._delta({"type": "input_json_delta", "partial_json": text})
        return events

    def end(self, delta: OutputDelta, stream: OutputStream) -> list[JsonObject]:
        """The last events."""
        assert delta.finish_reason is not None
        events: list[JsonObject] = []
        if not self.message["content"]:
            events += self._open({"type": "text", "text": ""})
        events += self._close()
        reason, sequence = STOP_REASONS.get(delta.finish_reason, CUT), None
        if reason == "end_turn" and self._reader is not None and self._reader.is_complete:
            reason = "tool_use"
        elif reason == "end_turn" and isinstance(delta.stop_reason, str):
            reason, sequence = "stop_sequence", delta.stop_reason
        usage = self._usage(stream.num_generated, stream.num_cached)
        self.message |= {"stop_reason": reason, "stop_sequence": sequence, "usage": usage}
        ended = {"stop_reason": reason, "stop_sequence": sequence}
        events.append({"type": "message_delta", "delta": ended, "usage": usage})
        return [*events, {"type": "message_stop"}]

    def _usage(self, num_generated: int, num_cached: int) -> JsonObject:
        return {
            "input_tokens": self._request.num_prompt_tokens - num_cached,
            "output_tokens": num_generated,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached,
        }

    def _text(self, text: str) -> list[JsonObject]:
        if not text:
            return []
        content = self.message["content"]
        events = []
        if not self._is_open or content[-1]["type"] != "text":
            events = [*self._close(), *self._open({"type": "text", "text": ""})]
        content[-1]["text"] += text
        return events + self._delta({"type": "text_delta", "text": text})

    def _open(self, block: JsonObject) -> list[JsonObject]:
        content = self.message["content"]
        content.append(block)
        self._is_open, self._arguments = True, ""
        index = len(content) - 1
        return [{"type": "content_block_start", "index": index, "content_block": {**block}}]

    def _close(self) -> list[JsonObject]:
        if not self._is_open:
            return []
        self._is_open = False
        block = self.message["content"][-1]
        if block["type"] == "tool_use":
            block["input"] = _parsed(self._arguments)
        index = len(self.message["content"]) - 1
        return [{"type": "content_block_stop", "index": index}]

    def _delta(self, delta: JsonObject) -> list[JsonObject]:
        index = len(self.message["content"]) - 1
        return [{"type": "content_block_delta", "index": index, "delta": delta}]


def _parsed(arguments: str) -> JsonObject:
    """Arguments as an object; of a call that was cut there is none."""
    try:
        found = json.loads(arguments)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True, slots=True)
class MessageEventWriter:
    """A stream's `Writer` of a message's events."""

    stream: OutputStream
    message: MessageWriter
    answer: AnswerWriter

    def write(self, _choice: int, output: Output, num_tokens: int) -> bool:
        """As Writer.write."""
        if not self.answer.is_ready:
            return False
        keeps_token_ids = self.stream.keeps_token_ids
        delta = OutputDelta.of(output, num_tokens, keeps_token_ids=keeps_token_ids)
        if events := self.message.add(delta):
            self.answer.write(_text_of(events))
        return True

    def send(self) -> None:
        """As Writer.send."""
        self.answer.flush()


class MessageEvents:
    """The events of a streamed message."""

    def __init__(self, stream: OutputStream, writer: MessageWriter) -> None:
        self._stream = stream
        self._writer = writer

    async def events(self, idle_seconds: float) -> AsyncIterator[bytes]:
        """As EventSource.events."""
        yield _as_sent(self._writer.begin())
        while True:
            deltas = await self._stream.take(idle_seconds)
            if not deltas:
                yield _as_sent([{"type": "ping"}])
                continue
            [delta] = deltas.values()
            if delta.finish_reason is FinishReason.ERROR:
                error: ApiError = engine_failed()
                yield _as_sent([error_body(error.status, str(error))])
                return
            events = self._writer.add(delta)
            if delta.finish_reason is not None:
                yield _as_sent([*events, *self._writer.end(delta, self._stream)])
                return
            if events:
                yield _as_sent(events)

    def write_with(self, writer: AnswerWriter) -> None:
        """From now on write events as their tokens come; `events` has the rest, and the end."""

        self._stream.writer = MessageEventWriter(self._stream, self._writer, writer)

    def close(self) -> None:
        """Cancel what has not ended."""
        self._stream.close()


def _as_sent(events: Sequence[JsonObject]) -> bytes:
    return _text_of(events).encode()


def _text_of(events: Sequence[JsonObject]) -> str:
    return "".join(f"event: {each['type']}\ndata: {compact(each)}\n\n" for each in events)

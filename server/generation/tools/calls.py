"""Reads the calls in an answer as it is generated: text, then names and arguments piece by piece.

The answer's grammar forces the texts around calls, so that they are found by comparison; only the
end of the arguments, which are JSON, has to be looked for.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from cottention.server.generation.tools.formats import ToolFormat
from cottention.server.schemas.tools import CallOptions

Delta = dict[str, Any]
"""A part of a message as streams have it: `content`, or one entry of `tool_calls`."""


class CallFormat(NamedTuple):
    """How an answer's calls are written, and which there may be."""

    format: ToolFormat
    options: CallOptions


@dataclass(slots=True)
class ReadCall:
    """A call that has been read, or its beginning."""

    id: str
    name: str
    arguments: str = ""

    def as_json(self) -> Delta:
        """As a message has it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class CallReader:
    """Reads one answer. content: its text before the calls. calls: those that have begun."""

    def __init__(self, call_format: CallFormat) -> None:
        self._format, options = call_format
        self._begins = {self._format.begin_of(tool): tool.name for tool in options.tools}
        self.content = ""
        self.calls: list[ReadCall] = []
        self._held = ""
        self._read = self._read_text
        self._opening = self._format.opening
        if options.is_required:
            self._read = self._read_begin
        self._depth = 0
        self._in_string = self._is_escaped = False

    @property
    def is_complete(self) -> bool:
        """Whether there are calls, and all of them have ended."""
        return bool(self.calls) and self._read != self._read_arguments

    def read(self, text: str, *, is_last: bool) -> list[Delta]:
        """The parts of the message that some more text adds; is_last: there is none after it."""
        self._held += text
        deltas: list[Delta] = []
        while self._held:
            before = len(self._held), self._read
            deltas += self._read()
            if (len(self._held), self._read) == before:
                break
        if is_last and not self.calls:  # what might have become a call is text after all
            deltas += self._text(self._held)
            self._held = ""
        return deltas

    def _text(self, text: str) -> list[Delta]:
        self.content += text
        return [{"content": text}] if text else []

    def _read_text(self) -> list[Delta]:
        """Text up to the trigger; what may be its beginning is held back."""
        trigger, held = self._format.trigger, self._held
        if self._format.follows_text:
            place = held.find(trigger)
        elif self.content:
            place = -1
        else:
            place = 0 if held.startswith(trigger) else -1
        if place >= 0:
            self._held = held[place:]
            self._read = self._read_begin
            return self._text(held[:place])
        kept = self._num_held_back()
        self._held = held[len(held) - kept :]
        return self._text(held[: len(held) - kept])

    def _num_held_back(self) -> int:
        trigger, held = self._format.trigger, self._held
        if not self._format.follows_text:
            return len(held) if not self.content and trigger.startswith(held) else 0
        longest = min(len(held), len(trigger) - 1)
        return next((n for n in range(longest, 0, -1) if trigger.startswith(held[-n:])), 0)

    def _read_begin(self) -> list[Delta]:
        """What stands before a call's arguments, all of it at once."""
        before = self._format.separator if self.calls else self._opening
        for begin, name in self._begins.items():
            if self._held.startswith(before + begin):
                self._held = self._held[len(before) + len(begin) :]
                self._read = self._read_arguments
                self.calls.append(ReadCall(self._format.new_id(), name))
                return [self._delta(self.calls[-1].as_json())]
        return []

    def _read_arguments(self) -> list[Delta]:
        end = self._end_of_arguments()
        text, self._held = self._held[:end], self._held[end:]
        call = self.calls[-1]
        call.arguments += text
        if self._depth == 0:
            self._read = self._read_end
        return [self._delta({"function": {"arguments": text}})]

    def _end_of_arguments(self) -> int:
        """Where the object ends; the length of what there is, where it does not end yet."""
        for place, character in enumerate(self._held, 1):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif character == "\\":
                    self._is_escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place
        return len(self._held)

    def _read_end(self) -> list[Delta]:
        end = self._format.end
        if self._held.startswith(end):
            self._held = self._held[len(end) :]
            self._read = self._read_begin
        return []

    def _delta(self, fields: Delta) -> Delta:
        return {"tool_calls": [{"index": len(self.calls) - 1, **fields}]}

"""A response's object and its events, made as its output comes, and again from what is stored.

What is stored is the finished object and its cuts: how much text each delta had. From these the
same events come again, with the same numbers.
"""

import copy
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from cottention.server.generation.json_pieces import compact
from cottention.server.schemas.responses import JsonObject

Event = JsonObject
"""An event of a stream: its type, its sequence_number and what it says."""

Status = Literal["completed", "incomplete", "failed", "cancelled"]

Cut = Sequence[int]
"""A delta: index of its output item, characters, log-probabilities."""

FINAL = ("status", "completed_at", "error", "incomplete_details", "output", "usage")
"""Fields that a response has only when it has ended."""


class ResponseWriter:
    """The response so far. response: its object. cuts: of its deltas."""

    def __init__(self, response: JsonObject) -> None:
        """response: with all fields but those of FINAL, which this sets."""
        self.response = response | {
            "status": "queued" if response["background"] else "in_progress",
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
        }
        self.cuts: list[Cut] = []
        self._num_events = 0
        self._has_open_item = False
        self._text = io.StringIO()

    def begin(self) -> list[Event]:
        """The first events."""
        events = [self._with_response("response.created")]
        if self.response["status"] == "queued":
            events.append(self._with_response("response.queued"))
            self.response["status"] = "in_progress"
        return [*events, self._with_response("response.in_progress")]

    def add_text(self, text: str, logprobs: Sequence[JsonObject] | None) -> list[Event]:
        """A delta of the message, which begins with the first. logprobs: None: it has none."""
        events = [] if self._is_open("message") else self._open_message(logprobs is not None)
        self._text.write(text)
        if logprobs is not None:
            self._item["content"][0]["logprobs"] += logprobs
        delta = self._event(
            "response.output_text.delta",
            item_id=self._item["id"],
            output_index=self._index,
            content_index=0,
            delta=text,
            logprobs=list(logprobs or ()),
        )
        self.cuts.append((self._index, len(text), len(logprobs or ())))
        return [*events, delta]

    def begin_call(self, call_id: str, name: str) -> list[Event]:
        """A call begins, after all that came before."""
        call = {"type": "function_call", "call_id": call_id, "name": name, "arguments": ""}
        return [*self._close("completed"), *self._open("fc", call)]

    def add_arguments(self, text: str) -> list[Event]:
        """A delta of the call that has begun."""
        self._text.write(text)
        self.cuts.append((self._index, len(text), 0))
        return [
            self._event(
                "response.function_call_arguments.delta",
                item_id=self._item["id"],
                output_index=self._index,
                delta=text,
            )
        ]

    def end(self, status: Status, completed_at: float, fields: JsonObject) -> list[Event]:
        """The last events. fields: `usage`, and of FINAL what there is to say."""
        events = self._close("completed" if status == "completed" else "incomplete")
        self.response |= fields | {"status": status}
        if status == "completed":
            self.response["completed_at"] = completed_at
        # There is no event for a cancelled response: it ends as one that is not complete.
        kind = "incomplete" if status == "cancelled" else status
        return [*events, self._with_response(f"response.{kind}")]

    def repeat(self, told: str, *, has_logprobs: bool) -> None:
        """Come to where another writer has come with these events, after those of `begin`."""
        for block in told.split("\n\n")[:-1]:
            event = json.loads(block.partition("\ndata: ")[2])
            match event["type"]:
                case "response.output_text.delta":
                    self.add_text(event["delta"], event["logprobs"] if has_logprobs else None)
                case "response.output_item.added" if event["item"]["type"] == "function_call":
                    self.begin_call(event["item"]["call_id"], event["item"]["name"])
                case "response.function_call_arguments.delta":
                    self.add_arguments(event["delta"])

    def snapshot(self) -> JsonObject:
        """The object as it is now, which does not change any more."""
        self._set_text()
        return copy.deepcopy(self.response)

    def _set_text(self) -> None:
        """Bring the open item up to date: to add each delta to its text would copy that."""
        if not self._has_open_item:
            return
        text, item = self._text.getvalue(), self._item
        if item["type"] == "message":
            item["content"][0]["text"] = text
        else:
            item["arguments"] = text

    @property
    def _item(self) -> JsonObject:
        item: JsonObject = self.response["output"][-1]
        return item

    @property
    def _index(self) -> int:
        return len(self.response["output"]) - 1

    def _is_open(self, kind: str) -> bool:
        return self._has_open_item and self._item["type"] == kind

    def _open_message(self, has_logprobs: bool) -> list[Event]:
        events = self._close("completed")
        events += self._open("msg", {"type": "message", "role": "assistant", "content": []})
        part: JsonObject = {"type": "output_text", "text": "", "annotations": []}
        part |= {"logprobs": []} if has_logprobs else {}
        self._item["content"].append(part)
        return [*events, self._with_part("response.content_part.added")]

    def _open(self, prefix: str, item: JsonObject) -> list[Event]:
        output = self.response["output"]
        digits = self.response["id"].removeprefix("resp_")
        new = {"id": f"{prefix}_{digits}{len(output):02x}", **item, "status": "in_progress"}
        output.append(new)
        self._has_open_item, self._text = True, io.StringIO()
        return [self._with_item("response.output_item.added")]

    def _close(self, status: str) -> list[Event]:
        if not self._has_open_item:
            return []
        self._set_text()
        item, self._has_open_item = self._item, False
        item["status"] = status
        where = {"item_id": item["id"], "output_index": self._index}
        if item["type"] == "message":
            [part] = item["content"]
            logprobs = list(part.get("logprobs", ()))
            done = self._event(
                "response.output_text.done",
                **where,
                content_index=0,
                text=part["text"],
                logprobs=logprobs,
            )
            events = [done, self._with_part("response.content_part.done")]
        else:
            said = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._event("response.function_call_arguments.done", **where, **said)]
        return [*events, self._with_item("response.output_item.done")]

    def _with_response(self, kind: str) -> Event:
        return self._event(kind, response=self.snapshot())

    def _with_item(self, kind: str) -> Event:
        return self._event(kind, output_index=self._index, item=copy.deepcopy(self._item))

    def _with_part(self, kind: str) -> Event:
        part = copy.deepcopy(self._item["content"][0])
        where = {"item_id": self._item["id"], "output_index": self._index}
        return self._event(kind, **where, content_index=0, part=part)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}


def replayed(response: JsonObject, cuts: Sequence[Cut]) -> Iterator[Event]:
    """The events of a response that has ended, from its object and its cuts."""
    base = {name: value for name, value in response.items() if name not in FINAL}
    writer = ResponseWriter(base)
    yield from writer.begin()
    output: list[JsonObject] = response["output"]
    ends: dict[int, tuple[int, int]] = {}
    begun = -1
    for index, num_characters, num_logprobs in cuts:
        item = output[index]
        for skipped in range(begun + 1, index + 1):
            if output[skipped]["type"] == "function_call":
                yield from writer.begin_call(output[skipped]["call_id"], output[skipped]["name"])
        begun = max(begun, index)
        start, first = ends.get(index, (0, 0))
        ends[index] = stop, last = start + num_characters, first + num_logprobs
        if item["type"] == "message":
            part = item["content"][0]
            logprobs = part["logprobs"][first:last] if "logprobs" in part else None
            yield from writer.add_text(part["text"][start:stop], logprobs)
        else:
            yield from writer.add_arguments(item["arguments"][start:stop])
    for call in output[begun + 1 :]:
        yield from writer.begin_call(call["call_id"], call["name"])
    final = {name: response[name] for name in FINAL if name not in ("output", "status")}
    yield from writer.end(response["status"], response["completed_at"], final)


def event_text(event: Event) -> str:
    """An event as it is sent."""
    return f"event: {event['type']}\ndata: {compact(event)}\n\n"

"""A response's events: in order, whole, and the same when they come again from what is stored."""

import json
from typing import Any

import pytest

from cottention.engine.errors import SnapshotError
from cottention.engine.sessions.store.protocol import Quota
from cottention.engine.state.event_log import EventLog
from cottention.server.responses.values import StoredResponse, quotas_with_responses, response_owner
from cottention.server.responses.writer import Event, ResponseWriter, event_text, replayed

LOGPROB = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}


def base(*, background: bool = False) -> dict[str, Any]:
    return {"id": "resp_" + "0" * 32, "object": "response", "background": background}


def written(*parts: Any, status: Any = "completed", background: bool = False) -> Any:
    """The events of texts, (text, logprobs), call names and {"arguments"}; and their writer."""
    writer = ResponseWriter(base(background=background))
    events = writer.begin()
    for part in parts:
        events += add_part(writer, part)
    events += writer.end(status, 7, {"usage": {"input_tokens": 1}})
    return events, writer


def add_part(writer: ResponseWriter, part: Any) -> list[Event]:
    match part:
        case str():
            return writer.add_text(part, None)
        case (text, logprobs):
            return writer.add_text(text, logprobs)
        case {"call": name}:
            return writer.begin_call(f"call_{name}", name)
        case {"arguments": text}:
            return writer.add_arguments(text)
    raise AssertionError(part)


CASES: dict[str, Any] = {
    "text": ("He", "llo", ""),
    "nothing": ("",),
    "logprobs": (("a", [LOGPROB]), ("aa", [LOGPROB, LOGPROB]), ("", [])),
    "calls": ({"call": "f"}, {"arguments": '{"a'}, {"arguments": '": 1}'}, {"call": "g"}),
    "text and calls": ("So: ", {"call": "f"}, {"arguments": "{}"}, {"call": "f"}),
    "empty calls": ({"call": "f"}, {"call": "g"}, {"call": "h"}, {"arguments": "{"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("status", ["completed", "incomplete", "cancelled"])
@pytest.mark.parametrize("background", [False, True])
def test_what_is_stored_gives_the_same_events(case: str, status: str, background: bool) -> None:
    """A client that was cut asks for the events after a number: they must have the same numbers."""
    events, writer = written(*CASES[case], status=status, background=background)
    stored = StoredResponse(writer.snapshot(), [], [*writer.cuts], True)
    again = StoredResponse.from_log(EventLog.from_bytes(stored.to_log().to_bytes()))
    assert json.loads(json.dumps(events)) == [*replayed(again.response, again.cuts)]
    assert [each["sequence_number"] for each in events] == list(range(len(events)))


def test_items_follow_one_another() -> None:
    events, _ = written("So: ", {"call": "f"}, {"arguments": "{}"})
    assert [each["type"].removeprefix("response.") for each in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    added = [each["item"]["status"] for each in events if each["type"].endswith("item.added")]
    done = [each["item"]["status"] for each in events if each["type"].endswith("item.done")]
    assert (added, done) == (["in_progress"] * 2, ["completed"] * 2)


def test_an_event_does_not_change_after_it_was_made() -> None:
    """It may wait for its client while more output comes."""
    writer = ResponseWriter(base())
    events = [*writer.begin(), *writer.add_text("a", None)]
    before = json.dumps(events)
    writer.add_text("b", None)
    writer.end("failed", 7, {"error": {"code": "server_error", "message": "x"}})
    assert json.dumps(events) == before


def test_what_is_cut_is_not_complete() -> None:
    events, _ = written("a", status="incomplete")
    kinds: list[Event] = [each for each in events if each["type"] == "response.output_item.done"]
    assert kinds[0]["item"]["status"] == "incomplete"
    assert events[-1]["response"]["completed_at"] is None
    assert event_text(events[0]).startswith("event: response.created\ndata: {")
    assert event_text(events[0]).endswith("}\n\n")


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b'{"response": 1}'])
def test_what_is_no_response_is_damaged(raw: bytes) -> None:
    with pytest.raises(SnapshotError):
        StoredResponse.from_log(EventLog("0" * 16, 0, (raw,)))


def test_responses_have_a_number_of_their_own() -> None:
    quotas = quotas_with_responses(lambda owner: Quota(5, len(owner)), 7)
    assert quotas("ab") == Quota(5, 2)
    assert quotas(response_owner("ab")) == Quota(7, 2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_told", range(4))
def test_another_writer_goes_on_from_what_was_told(case: str, num_told: int) -> None:
    """Events again, or other numbers, would be told to the client of a server that died."""
    parts = CASES[case]
    events, writer = written(*parts, background=True)
    dead, other = ResponseWriter(base(background=True)), ResponseWriter(base(background=True))
    told = dead.begin()
    assert other.begin() == told
    more = [event for part in parts[:num_told] for event in add_part(dead, part)]
    other.repeat("".join(map(event_text, more)), has_logprobs=case == "logprobs")
    rest = [event for part in parts[num_told:] for event in add_part(other, part)]
    rest += other.end("completed", 7, {"usage": {"input_tokens": 1}})
    assert [*told, *more, *rest] == events
    assert (other.snapshot(), other.cuts) == (writer.snapshot(), writer.cuts)

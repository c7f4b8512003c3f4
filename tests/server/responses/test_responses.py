"""POST /v1/responses and the paths of a response: what is kept, continued, followed and refused."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from cottention.engine.errors import (
    SessionQuotaError,
    SnapshotError,
    SnapshotMismatchError,
    StoreUnavailableError,
)
from cottention.server.generation.chat_template import ChatTemplate
from cottention.server.generation.template_environment import compile_template
from tests.server.fake_engine import FakeEngine
from tests.server.limits.test_api_keys import bearer
from tests.server.live import Live, eventually, serving

TEMPLATE = ChatTemplate(compile_template("{{ messages[-1]['content'] }}"), (), {})
"""The fake model says what a prompt `say:` tells it, else the alphabet."""

KEEP: dict[str, Any] = {"store": True, "max_output_tokens": 3}
ENDLESS = {"store": True, "background": True, "max_output_tokens": 1_000_000}


@pytest.fixture
def live() -> Iterator[Live]:
    with serving(FakeEngine(step_seconds=0.001), TEMPLATE) as live:
        yield live


def create(live: Live, said: Any, key: str | None = None, **body: Any) -> httpx.Response:
    headers = {} if key is None else bearer(key)
    return live.client.post("/v1/responses", json={"input": said} | body, headers=headers)


def made(live: Live, said: Any, **body: Any) -> Any:
    """A response's object."""
    response = create(live, said, **body)
    assert response.status_code == 200, response.text
    return response.json()


def get(live: Live, response_id: str, **query: Any) -> httpx.Response:
    return live.client.get(f"/v1/responses/{response_id}", params=query)


def error_of(response: httpx.Response) -> tuple[int, Any, Any]:
    error = response.json()["error"]
    return response.status_code, error["param"], error["code"]


def text_of(response: Any) -> str:
    return "".join(item["content"][0]["text"] for item in response["output"])


def events_of(text: str) -> list[Any]:
    """The events of a stream, each of which says its type twice."""
    found = []
    for block in text.split("\n\n")[:-1]:
        if not block.startswith(":"):
            fields = dict(line.split(": ", 1) for line in block.split("\n"))
            found.append(json.loads(fields["data"]))
            assert fields["event"] == found[-1]["type"]
    return found


def begun(live: Live, **body: Any) -> str:
    """The id of a response in the background that has said something."""
    response = made(live, "y", **ENDLESS | body)
    assert response["status"] == "queued"
    eventually(lambda: any(each.said > 2 for each in [*live.engine.running.values()]))
    return str(response["id"])


# Kept and continued


def test_an_answer_is_found_as_it_was_given(live: Live) -> None:
    response = made(live, "say:hello", store=True, metadata={"a": "b"})
    assert (response["status"], text_of(response)) == ("completed", "hello")
    assert response["usage"]["output_tokens"] == 5
    assert "until the server ends" in response["note"], "there is no --session-dir"
    assert get(live, response["id"]).json() == response


def test_without_a_folder_nothing_is_kept_unless_asked(live: Live) -> None:
    response = made(live, "x", max_output_tokens=2)
    assert response["store"] is False
    assert error_of(get(live, response["id"])) == (404, "response_id", "response_not_found")
    assert live.sessions.kept == {}


def test_with_a_folder_answers_are_kept_unless_refused() -> None:
    with serving(template=TEMPLATE, session_dir="the fake needs none") as live:
        response = made(live, "x", max_output_tokens=2)
        assert response["store"] is True
        assert "note" not in response
        assert get(live, response["id"]).json() == response
        refused = made(live, "x", max_output_tokens=2, store=False)
        assert get(live, refused["id"]).status_code == 404


def test_a_response_lives_for_its_time() -> None:
    with serving(template=TEMPLATE, response_ttl_seconds=0.1) as live:
        response_id = made(live, "x", **KEEP)["id"]
        eventually(lambda: get(live, response_id).status_code == 404)
        refused = create(live, "y", previous_response_id=response_id)
        assert error_of(refused)[2] == "response_not_found"


def test_instructions_come_before_the_input_and_are_told() -> None:
    template = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
    with serving(template=ChatTemplate(compile_template(template), (), {})) as live:
        said = [{"role": "developer", "content": [{"type": "input_text", "text": "b"}]}]
        response = made(live, said, instructions="a", **KEEP)
        assert live.engine.seen[-1].prompt == "system=a;system=b;"
        assert response["instructions"] == "a"
        items = live.client.get(f"/v1/responses/{response['id']}/input_items").json()["data"]
        assert len(items) == 1, "instructions are no item"


def test_a_continuation_reads_nothing_again(live: Live) -> None:
    first = made(live, "x", **KEEP)
    second = made(live, "y", previous_response_id=first["id"], **KEEP)
    assert live.engine.seen[-1].prompt == "y"
    assert bytes(live.engine.seen[-1].start.recent) == b"xabc"
    usage = second["usage"]
    assert usage["input_tokens"] == len("xabcy")
    assert usage["input_tokens_details"]["cached_tokens"] == len("xabc")
    assert second["previous_response_id"] == first["id"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (SnapshotError("secret path"), (500, None, "session_damaged")),
        (SnapshotMismatchError("other"), (409, "previous_response_id", "snapshot_mismatch")),
    ],
)
def test_what_cannot_be_read_of_a_response_says_which_it_is(
    live: Live, error: Exception, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no session to its client, who cannot rewind it."""
    response_id = made(live, "x", **KEEP)["id"]

    def value(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(live.sessions, "value", value)
    refused = create(live, "y", previous_response_id=response_id)
    assert error_of(refused) == expected
    message = refused.json()["error"]["message"]
    assert response_id in message
    assert "rewind" not in message
    assert "secret" not in message


def test_branches_are_apart_and_outlive_their_root(live: Live) -> None:
    root = made(live, "x", **KEEP)
    branches = [made(live, said, previous_response_id=root["id"], **KEEP) for said in "yz"]
    assert live.client.delete(f"/v1/responses/{root['id']}").json()["deleted"] is True
    assert error_of(get(live, root["id"]))[0] == 404
    refused = create(live, "y", previous_response_id=root["id"])
    assert error_of(refused) == (404, "previous_response_id", "response_not_found")
    for said, branch in zip("yz", branches, strict=True):
        made(live, "!", previous_response_id=branch["id"], **KEEP)
        assert bytes(live.engine.seen[-1].start.recent) == f"xabc{said}abc".encode()


def test_what_was_cut_by_its_limit_goes_on_and_what_was_cancelled_does_not(live: Live) -> None:
    """A state of tokens that the client may not have got would be another conversation's."""
    cut = made(live, "x", **KEEP)
    assert (cut["status"], cut["incomplete_details"]["reason"]) == (
        "incomplete",
        "max_output_tokens",
    )
    made(live, "y", previous_response_id=cut["id"])
    cancelled = begun(live)
    live.client.post(f"/v1/responses/{cancelled}/cancel")
    refused = create(live, "y", previous_response_id=cancelled)
    assert error_of(refused)[:2] == (400, "previous_response_id")
    assert "cancelled" in refused.json()["error"]["message"]


def test_keys_see_their_own_alone() -> None:
    with serving(template=TEMPLATE, api_key=("a" * 8, "b" * 8)) as live:
        mine = create(live, "x", key="a" * 8, **KEEP).json()["id"]
        unknown = f"resp_{'0' * 32}"
        for response_id in (mine, unknown, "resp_x"):
            path = f"/v1/responses/{response_id}"
            answers = [
                live.client.get(path, headers=bearer("b" * 8)),
                live.client.get(f"{path}/input_items", headers=bearer("b" * 8)),
                live.client.post(f"{path}/cancel", headers=bearer("b" * 8)),
                live.client.delete(path, headers=bearer("b" * 8)),
            ]
            assert {error_of(each) for each in answers} == {
                (404, "response_id", "response_not_found")
            }
        assert create(live, "y", key="a" * 8, previous_response_id=mine).status_code == 200
        assert create(live, "y", key="b" * 8, previous_response_id=mine).status_code == 404


def test_responses_are_no_sessions(live: Live) -> None:
    """A turn of one would change what other branches go on from."""
    response_id = made(live, "x", **KEEP)["id"]
    session_id = response_id.replace("resp_", "sess-")
    assert session_id in live.sessions.kept, "its digits are its session's"
    assert live.client.get("/v1/sessions").json()["data"] == []
    assert live.client.get(f"/v1/sessions/{session_id}").status_code == 404
    assert live.complete(prompt="y", session_id=session_id).status_code == 404


# Streams and the background


def test_a_stream_s_last_event_comes_when_it_is_kept(live: Live) -> None:
    events = events_of(create(live, "say:hi", stream=True, store=True).text)
    assert [each["sequence_number"] for each in events] == list(range(len(events)))
    assert (events[0]["type"], events[-1]["type"]) == ("response.created", "response.completed")
    deltas = [each["delta"] for each in events if each["type"].endswith("text.delta")]
    assert "".join(deltas) == "hi"
    assert get(live, events[-1]["response"]["id"]).json() == events[-1]["response"]


def test_a_stream_whose_client_leaves_is_not_kept(live: Live) -> None:
    body = {"input": "y", "store": True, "stream": True, "max_output_tokens": 1_000_000}
    with live.client.stream("POST", "/v1/responses", json=body) as stream:
        next(stream.iter_lines())
    eventually(lambda: not live.engine.running)
    eventually(lambda: not live.async_engine.streams)
    assert live.sessions.kept == {}


def test_in_the_background_it_goes_on_and_can_be_followed(live: Live) -> None:
    response_id = begun(live)
    assert get(live, response_id).json()["status"] == "in_progress"
    busy = create(live, "z", previous_response_id=response_id)
    assert error_of(busy) == (409, "previous_response_id", "response_in_progress")
    path, query = f"/v1/responses/{response_id}", {"stream": True, "starting_after": 2}
    with live.client.stream("GET", path, params=query) as stream:
        lines = stream.iter_lines()
        assert '"sequence_number":3' in next(line for line in lines if line.startswith("data"))
        cancelled = live.client.post(f"{path}/cancel").json()
        live_events = events_of("\n".join([*lines, ""]).lstrip("\n"))
    assert cancelled["status"] == "cancelled"
    assert live_events[-1]["response"]["status"] == "cancelled"
    assert get(live, response_id).json() == cancelled
    assert live.client.post(f"{path}/cancel").json() == cancelled, "it has ended: nothing changes"
    again = events_of(live.client.get(path, params=query).text)
    assert again[-len(live_events) :] == live_events
    assert again[0]["sequence_number"] == 3


def test_one_that_runs_is_deleted_when_it_has_been_cancelled(live: Live) -> None:
    response_id = begun(live)
    assert live.client.delete(f"/v1/responses/{response_id}").json()["deleted"] is True
    assert not live.engine.running
    assert error_of(get(live, response_id))[0] == 404


def test_what_is_told_to_its_client_alone_cannot_be_followed(live: Live) -> None:
    body = {"input": "y", "store": True, "stream": True, "max_output_tokens": 1_000_000}
    with live.client.stream("POST", "/v1/responses", json=body) as stream:
        lines = stream.iter_lines()
        first = next(line for line in lines if line.startswith("data"))
        response_id = json.loads(first.removeprefix("data: "))["response"]["id"]
        assert get(live, response_id).json()["status"] == "in_progress"
        followed = get(live, response_id, stream=True)
        assert error_of(followed) == (409, "stream", "response_in_progress")


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ({"starting_after": 3}, "starting_after"),
        ({"stream": True, "starting_after": 10_000}, "starting_after"),
        ({"stream": True, "starting_after": -1}, "starting_after"),
        ({"include": "reasoning.encrypted_content"}, "include"),
        ({"include_obfuscation": True}, "include_obfuscation"),
        ({"limit": 3}, "limit"),
    ],
)
def test_queries_that_are_wrong(live: Live, query: dict[str, Any], name: str) -> None:
    response_id = made(live, "x", **KEEP)["id"]
    assert error_of(get(live, response_id, **query))[:2] == (400, name)


# Items


def test_the_items_of_the_request_come_in_pages(live: Live) -> None:
    said = [{"role": "user", "content": each} for each in "abc"]
    response_id = made(live, said, **KEEP)["id"]

    def page(**query: Any) -> Any:
        return live.client.get(f"/v1/responses/{response_id}/input_items", params=query).json()

    def texts(found: Any) -> str:
        return "".join(item["content"][0]["text"] for item in found["data"])

    assert texts(page()) == "cba"
    assert texts(page(order="asc")) == "abc"
    first = page(order="asc", limit=2)
    assert (texts(first), first["has_more"]) == ("ab", True)
    rest = page(order="asc", after=first["last_id"])
    assert (texts(rest), rest["has_more"]) == ("c", False)
    unknown = live.client.get(f"/v1/responses/{response_id}/input_items", params={"after": "x"})
    assert error_of(unknown)[:2] == (400, "after")


def test_outputs_are_of_calls_that_there_are(live: Live) -> None:
    """The output of a call that nobody made would be read as an answer to nothing."""
    output = {"type": "function_call_output", "call_id": "call_1", "output": "3"}
    first = made(live, "x", **KEEP)
    refused = create(live, [output], previous_response_id=first["id"])
    assert error_of(refused)[:2] == (400, "input")
    assert "call_1" in refused.json()["error"]["message"]


# Refusals


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": []}, "input"),
        ({"n": 2}, "n"),
        ({"max_output_tokens": 10**9}, "max_output_tokens"),
        ({"session_id": "s"}, "session_id"),
        ({"return_state": True}, "return_state"),
    ],
)
def test_what_does_not_apply_is_refused_by_its_name(
    live: Live, body: dict[str, Any], name: str
) -> None:
    response = create(live, "x", **body)
    assert error_of(response)[:2] == (400, name)
    assert name in response.json()["error"]["message"]
    assert live.engine.seen == []


# Failures


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (SessionQuotaError("there are 5"), 429, "too_many_responses"),
        (StoreUnavailableError("the disk is full"), 507, "store_unavailable"),
        (RuntimeError("secret"), 500, None),
    ],
)
def test_an_answer_that_cannot_be_kept_has_failed(
    live: Live, error: Exception, status: int, code: str | None
) -> None:
    """Its id would otherwise be a promise that is not kept."""
    live.sessions.fails["open"] = error
    response = create(live, "x", **KEEP)
    assert (error_of(response)[0], error_of(response)[2]) == (status, code)
    live.sessions.fails["open"] = error
    streamed = create(live, "x", stream=True, **KEEP).text
    last = events_of(streamed)[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert "secret" not in streamed


def test_an_engine_s_fault_is_a_failed_response(live: Live) -> None:
    assert create(live, "fail", store=True).status_code == 500
    last = events_of(create(live, "fail", stream=True, store=True).text)[-1]
    assert last["type"] == "response.failed"
    failed = get(live, last["response"]["id"]).json()
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
    refused = create(live, "y", previous_response_id=failed["id"])
    assert "failed" in refused.json()["error"]["message"]

"""/v1/messages: a chat in Anthropic's shapes, its events in order, and errors in its form."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from cottention.engine.outputs import FinishReason, Output
from cottention.engine.sampling_params import SamplingParams
from cottention.server.generation.chat_template import ChatTemplate
from cottention.server.generation.output_stream import OutputDelta, OutputStream
from cottention.server.generation.request import GenerationRequest, OutputOptions
from cottention.server.generation.template_environment import compile_template
from cottention.server.generation.tools.calls import CallFormat
from cottention.server.generation.tools.formats import HERMES
from cottention.server.responses.messages import MessageWriter
from cottention.server.schemas.tools import CallOptions, Tool
from tests.server.fake_engine import FakeEngine
from tests.server.live import Live, eventually, serving
from tests.server.responses.test_responses import TEMPLATE, events_of

ROLES = ChatTemplate(
    compile_template("{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"), (), {}
)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(FakeEngine(step_seconds=0.001), TEMPLATE) as live:
        yield live


def post(live: Live, said: Any, path: str = "", **body: Any) -> httpx.Response:
    messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
    return live.client.post(f"/v1/messages{path}", json={"messages": messages} | body)


def made(live: Live, said: Any, **body: Any) -> Any:
    response = post(live, said, **{"max_tokens": 20} | body)
    assert response.status_code == 200, response.text
    return response.json()


def error_of(response: httpx.Response) -> tuple[int, str]:
    body = response.json()
    assert (body["type"], {*body}) == ("error", {"type", "error", "request_id"})
    return response.status_code, body["error"]["type"]


def test_a_message_says_why_it_ended(live: Live) -> None:
    message = made(live, "say:hi")
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", "fake")
    assert message["content"] == [{"type": "text", "text": "hi"}]
    assert (message["stop_reason"], message["usage"]["output_tokens"]) == ("end_turn", 2)
    assert made(live, "x", max_tokens=3)["stop_reason"] == "max_tokens"
    stopped = made(live, "say:hi", stop_sequences=["!"])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "!")


def test_one_that_was_ended_from_outside_can_be_gone_on_with(live: Live) -> None:
    with ThreadPoolExecutor() as pool:
        body = {"messages": [{"role": "user", "content": "y"}], "max_tokens": 1_000_000}
        headers = {"X-Request-Id": "cut"}
        asked = pool.submit(live.client.post, "/v1/messages", json=body, headers=headers)
        eventually(lambda: any(each.said > 2 for each in [*live.engine.running.values()]))
        live.client.post("/v1/requests/cut/cancel")
        assert asked.result().json()["stop_reason"] == "pause_turn"


def test_events_come_in_anthropic_s_order(live: Live) -> None:
    events = events_of(post(live, "say:hello", max_tokens=9, stream=True).text)
    kinds = [each["type"] for each in events]
    deltas = kinds.count("content_block_delta")
    assert kinds == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    texts = [each["delta"]["text"] for each in events if each["type"] == "content_block_delta"]
    assert "".join(texts) == "hello"
    assert events[0]["message"]["content"] == []
    assert events[-2]["delta"]["stop_reason"] == "end_turn"
    assert events[-2]["usage"]["output_tokens"] == 5


def test_a_prompt_is_counted_as_it_is_read(live: Live) -> None:
    counted = post(live, "hello", "/count_tokens").json()
    assert counted == {"input_tokens": 5}
    assert made(live, "hello")["usage"]["input_tokens"] == 5


def test_blocks_become_the_messages_of_a_chat() -> None:
    """Results of tools come before what is said beside them: the call was before that."""
    said = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "d"},
                {"type": "tool_result", "tool_use_id": "t", "content": "e"},
            ],
        },
    ]
    with serving(template=ROLES) as live:
        made(live, said, system=[{"type": "text", "text": "s"}])
        prompt = live.engine.seen[-1].prompt
    assert prompt.startswith("system=s;user=a\nb;assistant=c;")
    assert prompt.index("e") < prompt.index("user=d;")


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking"),
        ({"tools": [{"type": "web_search_20250305", "name": "x"}]}, "tools"),
        ({"stop_sequences": "text"}, "stop_sequences"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages"),
        ({"messages": []}, "messages"),
        ({"state": "x"}, "state"),
    ],
)
def test_what_does_not_apply_is_refused_by_its_name(
    live: Live, body: dict[str, Any], name: str
) -> None:
    response = post(live, "x", **{"max_tokens": 3} | body)
    assert error_of(response) == (400, "invalid_request_error")
    assert name in response.json()["error"]["message"]


def test_errors_have_anthropic_s_form(live: Live) -> None:
    assert error_of(post(live, "x")) == (400, "invalid_request_error"), "max_tokens is missing"
    assert error_of(post(live, "x", model="y", max_tokens=1)) == (404, "not_found_error")
    assert error_of(post(live, "fail", max_tokens=9)) == (500, "api_error")
    *_, last = events_of(post(live, "fail", max_tokens=9, stream=True).text)
    assert (last["type"], last["error"]["type"]) == ("error", "api_error")
    assert error_of(live.client.get("/v1/messages"))[0] == 405
    elsewhere = live.client.post("/v1/completions", json={}).json()
    assert "type" not in elsewhere, "the form is that of these paths alone"


def test_the_key_may_be_in_x_api_key() -> None:
    with serving(template=TEMPLATE, api_key=("k" * 8,)) as live:
        assert error_of(post(live, "x", max_tokens=1)) == (401, "authentication_error")
        live.client.headers["x-api-key"] = "no"
        assert error_of(post(live, "x", max_tokens=1)) == (401, "authentication_error")
        live.client.headers["x-api-key"] = "k" * 8
        assert post(live, "x", max_tokens=1).status_code == 200
        assert live.client.get("/v1/models").status_code == 401, "it is a key here alone"


def delta_of(text: str, reason: FinishReason | None = None) -> OutputDelta:
    delta = OutputDelta()
    delta.add(Output("a", 0, text, (), reason))
    return delta


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_calls_are_blocks_whose_input_comes_in_pieces(size: int) -> None:
    """Pieces are as large as a client is quick: what it puts together must be the same."""
    tool = Tool("find", '{"type": "object"}', {"type": "function", "function": {"name": "find"}})
    calls = CallFormat(HERMES, CallOptions((tool,), False, True))
    request = GenerationRequest([[1]], SamplingParams(), OutputOptions(calls=calls), [""])
    arguments = '{"a": "b"}'
    text = "So: " + HERMES.written([{"function": {"name": "find", "arguments": arguments}}])
    writer = MessageWriter("msg_1", "fake", request)
    events = writer.begin()
    for start in range(0, len(text), size):
        events += writer.add(delta_of(text[start : start + size]))
    last = delta_of("", FinishReason.STOP)
    events += writer.add(last)
    events += writer.end(last, OutputStream(1, lambda _: None, lambda _: None))
    said, call = writer.message["content"]
    assert said["text"].strip() == "So:"
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "find", {"a": "b"})
    assert writer.message["stop_reason"] == "tool_use"
    pieces = [
        each["delta"]["partial_json"]
        for each in events
        if each.get("delta", {}).get("type") == "input_json_delta"
    ]
    assert json.loads("".join(pieces)) == {"a": "b"}
    opened = [each["index"] for each in events if each["type"] == "content_block_start"]
    closed = [each["index"] for each in events if each["type"] == "content_block_stop"]
    assert opened == closed == [0, 1]

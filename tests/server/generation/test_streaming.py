"""Streamed completions: exact bytes, interleaving, usage, what an error or an idle stream sends."""

import asyncio
import json
from pathlib import Path
from typing import Any, cast

import pytest

from cottention.engine.outputs import FinishReason, Output
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.text.tokenizer import Tokenizer
from cottention.server.generation.chat_template import find_template
from cottention.server.generation.choice_format import ChatFormatter, CompletionFormatter
from cottention.server.generation.output_stream import OutputDelta, OutputStream
from cottention.server.generation.request import GenerationRequest, OutputOptions
from cottention.server.generation.sse import EventFormatter, ResponseHeader
from cottention.server.schemas.sampling import StreamOptions
from tests.server.fake_engine import FakeTokenizer
from tests.server.live import Live, eventually, serving

HEADER = ResponseHeader("cmpl-1", "text_completion", 7, "m")
HEAD = '"id":"cmpl-1","object":"text_completion","created":7,"model":"m"'


def delta(text: str, reason: FinishReason | None = None, num_tokens: int = 1) -> OutputDelta:
    made = OutputDelta()
    made.add(Output("r", 0, text, (1,) * num_tokens, reason))
    return made


def request(**options: bool) -> GenerationRequest:
    return GenerationRequest(
        [[1]],
        SamplingParams(n=2),
        OutputOptions(),
        [""],
        num_choices=2,
        is_stream=True,
        stream_options=StreamOptions.model_validate(options),
    )


def formatter(header: ResponseHeader = HEADER, **options: bool) -> EventFormatter:
    choices = CompletionFormatter(request(**options), cast(Tokenizer, FakeTokenizer()))
    stream = OutputStream(2, lambda _: None, lambda _: None)
    return EventFormatter(header, choices, request(**options), stream)


def events(made: EventFormatter, deltas: dict[int, OutputDelta]) -> str:
    return made.frame(asyncio.run(made.chunks(deltas)))


def test_an_event_s_bytes() -> None:
    assert events(formatter(), {0: delta('a"\u2028é\n')}) == (
        f'data: {{{HEAD},"choices":[{{"index":0,"text":"a\\"\\u2028\\u00e9\\n","logprobs":null,'
        '"finish_reason":null}]}\n\n'
    )
    assert formatter().end() == "data: [DONE]\n\n"


def test_an_event_s_bytes_beside_usage() -> None:
    made = formatter(include_usage=True)
    assert events(made, {1: delta("", FinishReason.LENGTH)}) == (
        f'data: {{{HEAD},"choices":[{{"index":1,"text":"","logprobs":null,'
        '"finish_reason":"length","stop_reason":null,"context_start":0}],"usage":null}\n\n'
    )
    usage = '{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}'
    made._stream.num_generated = 2
    assert made.end() == f'data: {{{HEAD},"choices":[],"usage":{usage}}}\n\ndata: [DONE]\n\n'


def test_the_end_of_a_chat_without_text_has_an_empty_delta() -> None:
    """As OpenAI sends it; before the end every delta has a content."""
    made = ChatFormatter(request(), cast(Tokenizer, FakeTokenizer()))
    _, *chunks = [*made.chunks(0, delta("")), *made.chunks(0, delta("", FinishReason.STOP))]
    assert [json.loads(f"{{{chunk}}}")["choices"][0]["delta"] for chunk in chunks] == [
        {"content": ""},
        {},
    ]


def test_usage_beside_every_event() -> None:
    made = formatter(include_usage=True, continuous_usage_stats=True)
    for num_tokens in (2, 5):
        usage = f'{{"prompt_tokens":1,"completion_tokens":{num_tokens},'
        usage += f'"total_tokens":{num_tokens + 1}}}'
        sent = events(made, {1: delta("x", num_tokens=2 if num_tokens == 2 else 3)})
        assert sent.endswith(f'"finish_reason":null}}],"usage":{usage}}}\n\n')
    assert '"choices":[],"usage":{' in made.end()


def test_usage_beside_every_event_needs_include_usage() -> None:
    made = formatter(continuous_usage_stats=True)
    assert '"usage"' not in events(made, {1: delta("x")})
    assert made.end() == "data: [DONE]\n\n"


USAGES: list[tuple[str, dict[str, Any]]] = [
    ("completions", {"prompt": ["ab", "c"], "n": 2}),
    ("completions", {"prompt": "say:one two", "logprobs": 1, "echo": True}),
    ("completions", {"prompt": "ab", "return_token_ids": True}),
    ("chat/completions", {"n": 2}),
    ("chat/completions", {"logprobs": True}),
    ("chat/completions", {"session_id": True}),
]


@pytest.mark.parametrize(("path", "body"), USAGES, ids=repr)
def test_usage_so_far_is_0_at_a_role_and_then_grows(
    path: str, body: dict[str, Any], tmp_path: Path
) -> None:
    """Clients that meter take the difference of two chunks; a role is no token."""
    with serving(template=find_template("plain", tmp_path)) as live:
        live.step_with_loop()
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = {"max_tokens": 6, "stream": True, "stream_options": options} | body
        if path == "chat/completions":
            body["messages"] = [{"role": "user", "content": "x"}]
        if "session_id" in body:
            body["session_id"] = live.opened()
        text = live.client.post(f"/v1/{path}", json=body).text
        *chunks, last = [json.loads(each[6:]) for each in text.split("\n\n")[:-2]]
        counts: dict[int, list[int]] = {}
        for chunk in chunks:
            (choice,), usage = chunk["choices"], chunk["usage"]
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
            counts.setdefault(choice["index"], []).append(usage["completion_tokens"])
        for found in counts.values():
            assert (found[0] == 0) == (path == "chat/completions")
            assert len(found) > 1
            assert found == sorted(set(found))
        assert sum(found[-1] for found in counts.values()) == last["usage"]["completion_tokens"]


def test_usage_so_far_counts_tokens_without_text() -> None:
    with serving() as live:
        live.step_with_loop()
        options = {"include_usage": True, "continuous_usage_stats": True}
        *chunks, last, _ = live.events(prompt="quiet", max_tokens=5, stream_options=options)
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [5]
        assert last["usage"]["completion_tokens"] == 5


def test_a_model_name_is_escaped_in_every_event() -> None:
    made = formatter(ResponseHeader("i", "o", 1, 'a"\n'))
    assert json.loads(events(made, {0: delta("x")})[6:])["model"] == 'a"\n'


def test_a_stream_s_headers_and_end(shared: Live) -> None:
    response = shared.client.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers
    assert response.text.endswith("data: [DONE]\n\n")


def test_a_stream_and_a_whole_response_have_equal_text(shared: Live) -> None:
    *chunks, done = shared.events(prompt=["say:one", "x"], n=2, max_tokens=5)
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    told = dict.fromkeys(range(4), "")
    reasons: dict[int, str] = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        assert choice["index"] not in reasons, "a choice spoke after its end"
        told[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
        assert "usage" not in chunk
    whole = shared.complete(prompt=["say:one", "x"], n=2, max_tokens=5).json()["choices"]
    assert told == {choice["index"]: choice["text"] for choice in whole}
    assert reasons == {choice["index"]: choice["finish_reason"] for choice in whole}


def test_usage_comes_in_a_chunk_of_its_own(shared: Live) -> None:
    *chunks, usage, done = shared.events(
        prompt=["ab", "c"], n=2, max_tokens=3, stream_options={"include_usage": True}
    )
    assert done == "[DONE]"
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}


def test_steps_without_text_are_not_sent(shared: Live) -> None:
    (chunk, _) = shared.events(prompt="quiet", max_tokens=20)
    assert chunk["choices"][0]["finish_reason"] == "length"


def test_an_error_is_an_event_and_the_end(shared: Live) -> None:
    *chunks, error = shared.events(prompt=["fail", "fine"], max_tokens=1000)
    assert error["error"]["type"] == "server_error"
    assert "secret" not in json.dumps(error)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert set(reasons) == {None, "error"}
    eventually(lambda: not shared.engine.running)


def test_bad_input_of_a_stream_is_a_plain_400(shared: Live) -> None:
    response = shared.complete(prompt="x", stream=True, max_tokens=-1)
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"


def test_an_idle_stream_gets_comments() -> None:
    with serving(sse_keep_alive_seconds=0.02) as live:
        live.engine.may_step.clear()
        body = {"prompt": "x", "stream": True, "max_tokens": 2}
        with live.client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert [next(lines), next(lines)] == [": keep-alive", ""]
            live.engine.may_step.set()
            assert list(lines)[-2] == "data: [DONE]"

"""Streamed completions: exact bytes, interleaving, usage, what an error or an idle stream sends."""

import json
from typing import cast

from cottention.engine.outputs import FinishReason, Output
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.text.tokenizer import Tokenizer
from cottention.server.generation.choice_format import CompletionFormatter
from cottention.server.generation.output_stream import OutputDelta
from cottention.server.generation.request import GenerationRequest, OutputOptions
from cottention.server.generation.sse import Events, Heading
from cottention.server.schemas.sampling import StreamOptions
from tests.server.fake_engine import FakeTokenizer
from tests.server.live import Live, eventually, serving

HEADING = Heading("cmpl-1", "text_completion", 7, "m")
HEAD = '"id":"cmpl-1","object":"text_completion","created":7,"model":"m"'


def piece(text: str, reason: FinishReason | None = None) -> OutputDelta:
    made = OutputDelta()
    made.add(Output("r", 0, text, (), reason))
    return made


def events(heading: Heading = HEADING, **options: bool) -> Events:
    order = GenerationRequest(
        prompts=[[1]],
        echoes=[""],
        params=SamplingParams(n=2),
        details=OutputOptions(),
        num_choices=2,
        is_stream=True,
        stream_options=StreamOptions.model_validate(options),
        priority=0,
        request_id=None,
    )
    return Events(heading, CompletionFormatter(order, cast(Tokenizer, FakeTokenizer())), order)


def test_an_event_s_bytes() -> None:
    assert events().pieces({0: piece('a"\u2028é\n')}, 1) == (
        f'data: {{{HEAD},"choices":[{{"index":0,"text":"a\\"\\u2028\\u00e9\\n","logprobs":null,'
        '"finish_reason":null}]}\n\n'
    )
    assert events().last(1) == "data: [DONE]\n\n"


def test_an_event_s_bytes_beside_usage() -> None:
    made = events(include_usage=True)
    assert made.pieces({1: piece("", FinishReason.LENGTH)}, 1) == (
        f'data: {{{HEAD},"choices":[{{"index":1,"text":"","logprobs":null,'
        '"finish_reason":"length","stop_reason":null,"context_start":0}],"usage":null}\n\n'
    )
    usage = '{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}'
    assert made.last(2) == f'data: {{{HEAD},"choices":[],"usage":{usage}}}\n\ndata: [DONE]\n\n'


def test_usage_beside_every_event() -> None:
    made = events(continuous_usage_stats=True)
    usage = '{"prompt_tokens":1,"completion_tokens":5,"total_tokens":6}'
    assert made.pieces({1: piece("x")}, 5).endswith(
        f'"finish_reason":null}}],"usage":{usage}}}\n\n'
    )
    assert made.last(5) == "data: [DONE]\n\n"


def test_a_model_name_is_escaped_in_every_event() -> None:
    made = events(Heading("i", "o", 1, 'a"\n'))
    assert json.loads(made.pieces({0: piece("x")}, 1)[6:])["model"] == 'a"\n'


def test_a_stream_s_headers_and_end(shared: Live) -> None:
    response = shared.client.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers
    assert response.text.endswith("data: [DONE]\n\n")


def test_a_stream_and_a_whole_answer_say_the_same(shared: Live) -> None:
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

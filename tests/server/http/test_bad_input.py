"""What bad input gets: a 4xx in OpenAI's form that names the field; and the server goes on."""

import json
import socket
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cottention.server.http.errors import ApiError
from cottention.server.http.json_body import MAX_NAMES, parse_object
from cottention.server.schemas.completions import CompletionRequest
from cottention.server.schemas.sampling import MAX_CHOICES
from tests.server.live import Live

BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "required"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": [""]}, "prompt", "empty"),
    ({"prompt": [[]]}, "prompt", "empty"),
    ({"prompt": [[1], []]}, "prompt", "empty"),
    ({"prompt": 5}, "prompt", "list of token ids"),
    ({"prompt": {}}, "prompt", "list of token ids"),
    ({"prompt": True}, "prompt", "list of token ids"),
    ({"prompt": [True]}, "prompt", "lists of token ids; at index 0 is true"),
    ({"prompt": [1, "a"]}, "prompt", 'lists of token ids; at index 1 is "a"'),
    ({"prompt": [1, 2, True]}, "prompt", "lists of token ids; at index 2 is true"),
    ({"prompt": ["a", 1]}, "prompt", "lists of token ids; at index 1 is 1"),
    ({"prompt": ["a", [1]]}, "prompt", "lists of token ids; at index 1 is a list"),
    ({"prompt": [[1], [2, 1.5]]}, "prompt", "at index 1 of the list at index 1 is 1.5"),
    ({"prompt": [[1], ["a"]]}, "prompt", 'at index 0 of the list at index 1 is "a"'),
    ({"prompt": [[1], 2]}, "prompt", "lists of token ids; at index 1 is 2"),
    ({"prompt": [[[1]]]}, "prompt", "at index 0 of the list at index 0 is a list"),
    ({"prompt": [None]}, "prompt", "lists of token ids; at index 0 is null"),
    ({"prompt": [{}]}, "prompt", "lists of token ids; at index 0 is an object"),
    ({"prompt": [1, -1]}, "prompt", "0 to 255; -1 (at index 1) is not"),
    ({"prompt": [256]}, "prompt", "0 to 255; 256 (at index 0) is not"),
    ({"prompt": [[1], [2, 3, 7000]]}, "prompt", "0 to 255; 7000 (at index 2) is not"),
    ({"prompt": [10**400]}, "prompt", "0 to 255; a number of more than 38 digits"),
    ({"prompt": ["x"] * (MAX_CHOICES + 1)}, "prompt", "at most 128"),
    ({"prompt": "\ud800"}, "prompt", "lone surrogate"),
    ({"prompt": ["x", "\udfff"]}, "prompt", "lone surrogate"),
    ({"max_tokens": -1}, "max_tokens", "from 1, or 0 with echo or prompt_logprobs"),
    ({"max_tokens": -1, "echo": True}, "max_tokens", "from 1, or 0 with echo"),
    ({"max_tokens": 0}, "max_tokens", "from 1, or 0 with echo or prompt_logprobs"),
    ({"max_tokens": "5"}, "max_tokens", "whole number from 1"),
    ({"max_tokens": 1.5}, "max_tokens", "whole number"),
    ({"max_tokens": True}, "max_tokens", "whole number"),
    ({"max_tokens": 10**400}, "max_tokens", "at most"),
    ({"max_tokens": float("nan")}, "max_tokens", "whole number"),
    ({"temperature": -0.1}, "temperature", "from 0"),
    ({"temperature": "hot"}, "temperature", "from 0"),
    ({"temperature": False}, "temperature", "from 0"),
    ({"temperature": float("nan")}, "temperature", "finite"),
    ({"temperature": float("inf")}, "temperature", "finite"),
    ({"temperature": 10**400}, "temperature", "finite"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.1}, "top_p", "greater than 0, up to 1; it is 1.1"),
    ({"repetition_penalty": -1}, "repetition_penalty", "greater than 0; it is -1"),
    ({"top_k": -2}, "top_k", "whole number"),
    ({"top_k": 10**30}, "top_k", "whole number"),
    ({"min_p": 2}, "min_p", "0 to 1"),
    ({"seed": 2**63}, "seed", "whole number"),
    ({"seed": "a"}, "seed", "whole number"),
    ({"n": 0}, "n", "from 1"),
    ({"n": MAX_CHOICES + 1}, "n", "at most 128"),
    ({"n": 65}, "n", "at most 64"),
    ({"n": [1]}, "n", "it is a list"),
    ({"stop": 5}, "stop", "16 strings"),
    ({"stop": [1]}, "stop", "16 strings; at index 0 is 1"),
    ({"stop": ["\ud800"]}, "stop", "lone surrogate, which is not a character: U+D800 at index 0"),
    ({"stop": ""}, "stop", "1 to 256 characters; at index 0 is '', of 0"),
    ({"stop": ["a", "b" * 300]}, "stop", "1 to 256 characters; at index 1 is 'bbb"),
    ({"stop": [str(n) for n in range(17)]}, "stop", "at most 16"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream": 1}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream is true"),
    ({"stream": True, "stream_options": 5}, "stream_options", "object"),
    (
        {"stream": True, "stream_options": {"include_usage": 1}},
        "stream_options.include_usage",
        "true or false",
    ),
    ({"stream": True, "stream_options": {"extra": 1}}, "stream_options.extra", "no field"),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "not supported yet: leave it out or send false",
    ),
    ({"ignore_eos": "no"}, "ignore_eos", "true or false"),
    ({"model": 5}, "model", "string"),
    ({"nonsense": 1}, "nonsense", "no field"),
    ({"max_token": 1}, "max_token", "did you mean max_tokens?"),
    ({"Temperature": 1}, "Temperature", "did you mean temperature?"),
    ({"top-k": 1}, "top-k", "did you mean top_k?"),
    ({"\ud800": 1}, "\ud800", "no field"),
    ({"echo": 0}, "echo", "true or false"),
    ({"logprobs": -1}, "logprobs", "0 to 20"),
    ({"logprobs": 21}, "logprobs", "0 to 20"),
    ({"logprobs": True}, "logprobs", "0 to 20"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "0 to 20"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
    ({"best_of": 0}, "best_of", "at least n"),
    ({"n": 2, "best_of": 1}, "best_of", "at least n (2); it is 1"),
    ({"best_of": 2, "stream": True}, "best_of", "stream"),
    ({"best_of": 129}, "best_of", "at most 128"),
    ({"presence_penalty": 2.5}, "presence_penalty", "-2 to 2"),
    ({"frequency_penalty": "a"}, "frequency_penalty", "-2 to 2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
    ({"logit_bias": {"4": 1, "5": 101}}, "logit_bias", "id 5 must be a finite number from -100"),
    ({"logit_bias": {"5": True}}, "logit_bias", '-100 to 100 each; "5" has true'),
    ({"logit_bias": {" 5": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"05": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"1e1": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "token ids"),
    ({"logit_bias": [5]}, "logit_bias", "token ids"),
    ({"stop_token_ids": 5}, "stop_token_ids", "list of token ids"),
    ({"stop_token_ids": [True]}, "stop_token_ids", "list of token ids; at index 0 is true"),
    ({"allowed_token_ids": ["a"]}, "allowed_token_ids", "list of token ids"),
    ({"bad_words": "a"}, "bad_words", "list of strings"),
    ({"bad_words": ["\ud800"]}, "bad_words", "lone surrogate"),
    ({"min_tokens": 17}, "min_tokens", "0 to 16 (max_tokens); it is 17"),
    ({"bad_words": ["a", ""]}, "bad_words", "1 to 256 characters; at index 1 is ''"),
    ({"prompt": ["a", ""]}, "prompt", "must not be empty; at index 1 it is"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "from 1, or -1"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "from 1, or -1"),
    ({"truncation_side": "up"}, "truncation_side", '"left" or "right"'),
    ({"priority": 2**63}, "priority", "64 bits"),
    ({"request_id": 5}, "request_id", "up to 128 letters"),
    ({"request_id": "a\nb"}, "request_id", "up to 128 letters"),
    ({"request_id": "\ud800"}, "request_id", "up to 128 letters"),
    ({"echo": True, "prompt": [300]}, "prompt", "0 to 255; 300 (at index 0) is not"),
    ({"suffix": "end"}, "suffix", "since the model only continues text"),
    ({"response_format": "json"}, "response_format", 'must be {"type": "text"}'),
    ({"response_format": {"type": "json_schema"}}, "response_format", "its json_schema is null"),
    ({"response_format": {"type": "yaml"}}, "response_format", 'its type is "yaml"'),
    ({"response_format": {"typ": "text"}}, "response_format", 'the unknown field "typ"'),
    ({"guided_json": "{"}, "guided_json", "its text is no JSON"),
    ({"guided_json": [1]}, "guided_json", "a JSON schema, as an object or its text; it is a list"),
    ({"guided_choice": ["a", ""]}, "guided_choice", "guided_choice[1] must be a text that is not"),
    ({"guided_regex": "\ud800"}, "guided_regex", "lone surrogate"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "possible with guided_regex"),
    ({"structured_outputs": {}}, "structured_outputs", "one of json, json_object, regex"),
    ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "regex, json"),
    (
        {"structured_outputs": {"regex": "a", "disable_additional_properties": 1}},
        "structured_outputs",
        "disable_additional_properties must be true or false",
    ),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "not possible with guided_regex"),
]


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of a refusal, whose form is checked."""
    assert response.status_code == status, response.text
    (body,) = response.json().values()
    assert body.keys() == {"message", "type", "param", "code"}
    assert body["type"] == "invalid_request_error"
    return body


@pytest.mark.parametrize(("fields", "param", "says"), BAD_FIELDS, ids=repr)
def test_a_bad_field_is_named(shared: Live, fields: dict[str, Any], param: str, says: str) -> None:
    raw = json.dumps({"prompt": "x"} | fields)
    error = refused(shared.client.post("/v1/completions", content=raw))
    assert error["param"] == param
    assert says in error["message"]
    assert len(error["message"]) < 600


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "it is empty: send {}"),
        (b"{", "not JSON"),
        (b"prompt=x", "not JSON"),
        (b"[]", "it is a list"),
        (b'"x"', 'it is "x"'),
        (b"null", "it is null"),
        (b"NaN", "it is nan"),
        (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ('{"prompt": "x"}'.encode("utf-16"), "not UTF-8"),
        (b'{"prompt": "x", "n": 1, "n": 2}', '"n" twice'),
        (b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested too deeply"),
        (b'{"prompt": [' + b"1" * 5000 + b"]}", "too many digits"),
        (b'{"prompt": "\x00"}', "control character"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_body_that_is_no_object_is_refused(shared: Live, raw: bytes, says: str) -> None:
    assert says in refused(shared.client.post("/v1/completions", content=raw))["message"]


def test_an_infinite_literal_is_refused_by_name(shared: Live) -> None:
    raw = b'{"prompt": "x", "temperature": 1e999}'
    assert refused(shared.client.post("/v1/completions", content=raw))["param"] == "temperature"


def test_one_name_twice_among_very_many_is_found_at_once() -> None:
    names = ", ".join(f'"{number}": 0' for number in range(MAX_NAMES - 1))
    with pytest.raises(ApiError, match='"9998" twice'):  # by pairs it would take minutes
        parse_object(f'{{{names}, "9998": 0}}'.encode())


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
def test_an_encoded_body_is_refused_by_its_encoding(shared: Live, encoding: str) -> None:
    headers = {"Content-Encoding": encoding}
    answer = shared.client.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
    error = refused(answer, 415)
    assert (error["code"], encoding in error["message"]) == ("unsupported_encoding", True)


def test_a_body_that_says_it_is_as_it_is_is_taken(shared: Live) -> None:
    headers = {"Content-Encoding": "identity"}
    answer = shared.client.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
    assert answer.status_code == 200


def test_a_body_longer_than_the_limit_is_refused_when_announced(shared: Live) -> None:
    error = refused(shared.complete(prompt="x" * 200_001), 413)
    assert error["code"] == "body_too_large"
    assert "200000 bytes" in error["message"]


def test_a_body_longer_than_the_limit_is_refused_while_it_comes(shared: Live) -> None:
    chunks = (b"x" * 10_000 for _ in range(1000))
    refused(shared.client.post("/v1/completions", content=chunks), 413)
    assert shared.complete(prompt="x").status_code == 200


def test_a_body_that_never_ends_is_refused_before_its_end(shared: Live) -> None:
    host, port = shared.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        sock.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(21):
            sock.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_leaves_within_its_body_harms_nobody(shared: Live) -> None:
    host, port = shared.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
    assert shared.complete(prompt="x").status_code == 200


def test_an_unknown_path_and_method_are_refused_in_the_same_form(shared: Live) -> None:
    assert "/v1/nowhere" in refused(shared.client.get("/v1/nowhere"), 404)["message"]
    response = shared.client.get("/v1/completions")
    refused(response, 405)
    assert response.headers["allow"] == "POST"


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from([*CompletionRequest.model_fields, *CompletionRequest.neutral]) | st.text()


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(body=st.dictionaries(names, anything, max_size=5), prompt=anything | st.just("x"))
def test_no_body_whatever_is_a_500(shared: Live, body: dict[str, Any], prompt: Any) -> None:
    body = {"prompt": prompt} | body | {"max_tokens": 1}
    raw = json.dumps(body)
    response = shared.client.post("/v1/completions", content=raw)
    assert response.status_code in (200, 400, 404, 504), response.text  # 504: its own timeout
    if response.status_code in (400, 404):
        refused(response, response.status_code)

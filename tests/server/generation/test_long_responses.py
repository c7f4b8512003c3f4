"""Responses that are long: bounded, made once, in pieces, and beside the event loop."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from cottention.server.generation.json_pieces import (
    BATCH_CHARACTERS,
    BATCH_ITEMS,
    TEXT_CHARACTERS,
    LongList,
    compact,
    encode_elements,
    encode_unicode,
    json_pieces,
)
from tests.server.limits.test_api_keys import bearer
from tests.server.live import Live, eventually, serving

IDS = [7, 9] * 400
SCORED = {"prompt": IDS, "prompt_logprobs": 20, "max_tokens": 1}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving() as live:
        yield live


@pytest.fixture
def named(live: Live, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads in which tokens are given their texts."""
    threads: list[int] = []
    for name in ("token_text", "id_to_token"):
        make = getattr(live.engine.tokenizer, name)

        def noting(token_id: int, make: Any = make) -> str:
            threads.append(threading.get_ident())
            text: str = make(token_id)
            return text

        monkeypatch.setattr(live.engine.tokenizer, name, noting)
    return threads


def loop_thread(live: Live) -> int:
    found: list[int] = []
    live.loop_call(lambda: found.append(threading.get_ident()))
    return found[0]


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": [], "b": {"c": None, "d": 1.5}},
        {"long": list(range(3 * BATCH_ITEMS + 1)), "exact": [[1]] * BATCH_ITEMS},
        {"text": "é\n\u2028\U0001f600" * TEXT_CHARACTERS, "nested": {"x": ["y" * 100] * 1000}},
    ],
)
@pytest.mark.parametrize("encode", [compact, encode_unicode])
def test_pieces_are_the_json_of_their_value(value: Any, encode: Any) -> None:
    pieces = list(json_pieces(value, encode))
    assert json.loads("".join(pieces)) == value
    assert max(map(len, pieces)) <= 12 * TEXT_CHARACTERS


def test_elements_of_many_objects_are_encoded_a_few_at_a_time() -> None:
    """Nobody else runs in Python meanwhile: 128 tokens with 20 alternatives each took 4 ms."""
    scored = {str(rank): {"rank": rank, "token": "x" * 20} for rank in range(21)}
    size = len(compact(scored))
    texts = list(encode_elements([scored] * 300, compact))
    assert json.loads(f"[{','.join(texts)}]") == [scored] * 300
    assert max(map(len, texts)) <= max(size, BATCH_CHARACTERS) + size


def test_a_list_goes_on_after_what_is_encoded() -> None:
    encoded = list(encode_elements(range(200), compact))
    for values, expected in (((), [*range(200)]), (["x"], [*range(200), "x"])):
        text = "".join(json_pieces(LongList(values, encoded), compact))
        assert json.loads(text) == expected
    assert "".join(json_pieces(LongList(()), compact)) == "[]"


@pytest.mark.parametrize(
    "more", [{"prompt_logprobs": 20}, {"echo": True, "logprobs": 20, "prompt_logprobs": 3}]
)
def test_a_prompt_s_scores_are_worded_once_and_beside_the_loop(
    live: Live, named: list[int], more: dict[str, Any]
) -> None:
    body = SCORED | more
    (alone,) = live.complete(**body).json()["choices"]
    num_alone = len(named)
    named.clear()
    choices = live.complete(**body, n=16).json()["choices"]
    assert choices == [alone | {"index": index} for index in range(16)]
    assert len(named) < num_alone + 16 * 100  # each has a token of its own besides
    assert loop_thread(live) not in named
    assert len(alone["prompt_logprobs"]) == len(IDS)


def test_an_echo_in_a_stream_is_made_beside_the_loop(live: Live, named: list[int]) -> None:
    body = {"prompt": IDS, "echo": True, "logprobs": 20, "max_tokens": 1, "n": 4}
    expected = live.complete(**body).json()["choices"]
    named.clear()
    *chunks, _ = live.events(**body)
    told = {chunk["choices"][0]["index"]: chunk["choices"][0]["logprobs"] for chunk in chunks}
    assert [told[index] for index in range(4)] == [choice["logprobs"] for choice in expected]
    assert loop_thread(live) not in named


def test_a_long_tokenisation_is_written_beside_the_loop(live: Live, named: list[int]) -> None:
    body = {"prompt": "x" * 50_000, "return_token_strs": True}
    told = live.client.post("/tokenize", json=body).json()
    assert told["token_strs"] == ["<78>"] * 50_000
    assert len(named) == 50_000
    assert loop_thread(live) not in named
    text = live.client.post("/detokenize", json={"tokens": told["tokens"] * 2}).json()["prompt"]
    assert text == "x" * 100_000


def test_a_response_is_made_as_its_client_reads(live: Live, named: list[int]) -> None:
    """Else who reads nothing holds all of it in memory."""
    total = 21 * 40_000
    with live.connect(prompt=[7, 9] * 20_000, prompt_logprobs=20, max_tokens=1) as sock:
        assert sock.recv(15) == b"HTTP/1.1 200 OK"
        assert live.complete(prompt="x").status_code == 200
        assert 0 < len(named) < total / 2
    eventually(lambda: live.engine.running, equals={})


BEYOND: list[tuple[dict[str, Any], str]] = [
    ({"prompt": IDS, "prompt_logprobs": 20, "n": 60}, "prompt_logprobs"),
    ({"prompt": [IDS] * 2, "echo": True, "logprobs": 20, "n": 30}, "logprobs"),
    ({"prompt": IDS, "echo": True, "logprobs": 9, "n": 128, "stream": True}, "logprobs"),
    ({"prompt": "x", "logprobs": 1, "n": 2, "max_tokens": 250_001}, "logprobs"),
    ({"prompt": "x", "return_token_ids": True, "n": 64, "max_tokens": 20_000}, "return_token_ids"),
    ({"prompt": "x" * 10_000, "echo": True, "n": 101}, "echo"),
    ({"prompt": "x", "best_of": 10, "max_tokens": 100_001}, "best_of"),
]


@pytest.mark.parametrize(("body", "param"), BEYOND)
def test_a_response_has_a_bounded_number_of_ids_and_scores(
    live: Live, body: dict[str, Any], param: str
) -> None:
    refused = live.complete(**body)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == param
    assert "at most 1000000 token ids" in error["message"]
    assert "--max-response-items" in error["message"]


def test_the_bound_is_a_setting_and_a_stream_is_not_bound_by_what_it_generates() -> None:
    with serving(max_response_items=40) as live:
        body = {"prompt": "x", "logprobs": 1, "max_tokens": 20}
        assert live.complete(**body).status_code == 200
        assert live.complete(**body | {"max_tokens": 21}).status_code == 400
        assert live.events(**body | {"max_tokens": 21})[-1] == "[DONE]"
        assert live.complete(prompt="x", max_tokens=100).status_code == 200


def test_responses_of_one_key_leave_room_for_another_s_until_they_are_sent() -> None:
    one, two = bearer("first-key"), bearer("second-key")

    def status(live: Live, key: dict[str, str], max_tokens: int) -> int:
        body = {"prompt": "x", "logprobs": 1, "max_tokens": max_tokens}
        return live.client.post("/v1/completions", json=body, headers=key).status_code

    with serving(api_key=("first-key", "second-key"), max_response_items=100) as live:
        live.client.headers.update(one)
        live.engine.may_step.clear()
        with live.connect(prompt="x", logprobs=1, max_tokens=45):
            eventually(lambda: live.engine.running)
            refused = live.complete(prompt="x", logprobs=1, max_tokens=11)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "too_many_items"
            assert "90 token ids and log-probabilities together" in refused.text
            live.engine.may_step.set()
            assert status(live, two, 50) == 200
            assert live.complete(prompt="x", max_tokens=10).status_code == 200
        eventually(lambda: status(live, one, 50), equals=200)

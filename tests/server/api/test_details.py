"""What a completion tells beside text: echo, log-probabilities, ids, the best of several."""

from typing import Any

import pytest

from cottention.server.generation.request import MAX_INLINE_TOKENS
from tests.server.live import Live

Choice = dict[str, Any]


def joined(live: Live, **body: Any) -> list[Choice]:
    """The choices of a streamed answer, each put together from its chunks."""
    found: dict[int, Choice] = {}
    *chunks, _ = live.events(**body)
    for chunk in chunks:
        (choice,) = chunk["choices"]
        choice = dict.fromkeys(("prompt_logprobs", "prompt_token_ids", "token_ids")) | choice
        so_far = found.setdefault(choice["index"], choice)
        if so_far is choice:
            continue
        so_far["text"] += choice["text"]
        for name in ("finish_reason", "stop_reason", "context_start"):
            so_far[name] = choice.get(name)
        for name, more in (choice["logprobs"] or {}).items():
            so_far["logprobs"][name] += more
        if choice["token_ids"] is not None:
            assert choice["prompt_token_ids"] is None
            so_far["token_ids"] += choice["token_ids"]
    return [found[index] for index in sorted(found)]


def whole(live: Live, **body: Any) -> list[Choice]:
    answer = live.complete(**body).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    choices: list[Choice] = answer["choices"]
    return choices


def test_logprobs_have_openai_s_shape(shared: Live) -> None:
    (choice,) = whole(shared, prompt="x", max_tokens=2, logprobs=2)
    assert choice["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.97, -0.98],
        "top_logprobs": [{"\x00": 0.0, "\x01": -0.01, "a": -0.97}] * 1
        + [{"\x00": 0.0, "\x01": -0.01, "b": -0.98}],
        "text_offset": [0, 1],
    }


def test_logprobs_0_returns_only_the_sampled_tokens(shared: Live) -> None:
    (choice,) = whole(shared, prompt="x", max_tokens=1, logprobs=0)
    assert choice["logprobs"]["top_logprobs"] == [{"a": -0.97}]


def test_an_echoed_prompt_is_scored_but_for_its_first_token(shared: Live) -> None:
    (choice,) = whole(shared, prompt="xyz", max_tokens=1, logprobs=1, echo=True)
    assert choice["text"] == "xyza"
    assert choice["logprobs"]["tokens"] == ["x", "y", "z", "a"]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.21, -1.22, -0.97]
    assert choice["logprobs"]["top_logprobs"][:2] == [None, {"\x00": 0.0, "y": -1.21}]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]


def test_max_tokens_0_scores_a_prompt(shared: Live) -> None:
    answer = shared.complete(prompt=["xyz", "ab"], max_tokens=0, logprobs=1, echo=True).json()
    assert [choice["text"] for choice in answer["choices"]] == ["xyz", "ab"]
    assert answer["choices"][1]["logprobs"]["token_logprobs"] == [None, -0.98]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 0,
        "total_tokens": 5,
        "prompt_tokens_details": None,
    }


def test_ids_are_echoed_as_their_text(shared: Live) -> None:
    (choice,) = whole(shared, prompt=list("aé".encode()), max_tokens=1, echo=True, logprobs=0)
    assert choice["text"] == "aéa"
    assert choice["logprobs"]["tokens"] == ["a", "\ufffd", "\ufffd", "a"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("fields", "echoed", "ids"),
    [
        ({"truncate_prompt_tokens": 2}, "yz", [121, 122]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, "xy", [120, 121]),
        ({"truncate_prompt_tokens": -1}, "xyz", [120, 121, 122]),
    ],
)
def test_a_truncated_prompt_is_echoed_as_it_was_read(
    shared: Live, fields: Any, echoed: str, ids: list[int]
) -> None:
    body = {"prompt": "xyz", "max_tokens": 1, "echo": True, "return_token_ids": True}
    (choice,) = whole(shared, **body, **fields)
    assert choice["text"] == echoed + "a"
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (ids, [97])


def test_tokens_may_be_named_by_number(shared: Live) -> None:
    body = {"prompt": "x", "max_tokens": 1, "logprobs": 1, "return_tokens_as_token_ids": True}
    (choice,) = whole(shared, **body)
    assert choice["logprobs"]["tokens"] == ["token_id:97"]
    assert choice["logprobs"]["top_logprobs"] == [{"token_id:0": 0.0, "token_id:97": -0.97}]


def test_prompt_logprobs_have_vllm_s_shape(shared: Live) -> None:
    first, second = whole(shared, prompt="x\x00", n=2, max_tokens=1, prompt_logprobs=1)
    assert first["prompt_logprobs"] == [
        None,
        {"0": {"logprob": 0.0, "rank": 1, "decoded_token": "\x00"}},
    ]
    assert second["prompt_logprobs"] == first["prompt_logprobs"]
    (other,) = whole(shared, prompt="xy", max_tokens=1, prompt_logprobs=1, logprobs=3, echo=True)
    assert other["prompt_logprobs"][1] == {
        "121": {"logprob": -1.21, "rank": 122, "decoded_token": "y"},
        "0": {"logprob": 0.0, "rank": 1, "decoded_token": "\x00"},
    }


EVERYTHING = {
    "prompt": ["say:one", "xyz"],
    "n": 2,
    "max_tokens": 5,
    "logprobs": 2,
    "echo": True,
    "return_token_ids": True,
}


@pytest.mark.parametrize("left_out", [None, "logprobs", "echo", "return_token_ids"])
def test_a_stream_has_the_details_of_a_whole_response(shared: Live, left_out: str | None) -> None:
    body = {name: value for name, value in EVERYTHING.items() if name != left_out}
    assert joined(shared, **body) == whole(shared, **body)


def test_ids_are_sent_while_text_is_held_back(shared: Live) -> None:
    *chunks, _ = shared.events(prompt="quiet", max_tokens=3, return_token_ids=True)
    told = [token_id for chunk in chunks for token_id in chunk["choices"][0]["token_ids"]]
    assert told == [97, 98, 99]


def test_stop_reason_is_returned_with_finish_reason(shared: Live) -> None:
    (choice,) = whole(shared, prompt="say:one", stop=["!"])
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "!")
    (streamed,) = joined(shared, prompt="say:one", stop=["!"])
    assert (streamed["finish_reason"], streamed["stop_reason"]) == ("stop", "!")


def test_best_of_returns_the_best_and_counts_all(shared: Live) -> None:
    answer = shared.complete(prompt=["x", "y"], best_of=3, n=2, max_tokens=2, echo=True).json()
    assert [choice["text"] for choice in answer["choices"]] == ["xab", "xab", "yab", "yab"]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 12


def test_parameters_reach_the_engine(shared: Live) -> None:
    given: dict[str, Any] = {
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
        "min_tokens": 1,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "ignore_eos": True,
    }
    lists: dict[str, Any] = {"stop_token_ids": [1], "allowed_token_ids": [2], "bad_words": ["x"]}
    body = {"prompt": "reach", "max_tokens": 1, "priority": -2, "logit_bias": {"5": 1}}
    assert shared.complete(**body, **given, **lists).status_code == 200
    (seen,) = (each for each in shared.engine.seen if each.prompt == "reach")
    assert {name: getattr(seen.params, name) for name in given} == given
    assert {name: list(getattr(seen.params, name)) for name in lists} == lists
    assert seen.params.logit_bias == {5: 1}
    assert seen.priority == -2


def test_a_response_has_the_request_s_id(shared: Live) -> None:
    assert shared.complete(prompt="x", request_id="mine").json()["id"] == "cmpl-mine"
    response = shared.client.post(
        "/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": "theirs"}
    )
    assert response.json()["id"] == "cmpl-theirs"
    assert response.headers["x-request-id"] == "theirs"


def test_details_of_a_long_prompt_are_computed_in_a_thread(shared: Live) -> None:
    body = {"prompt": [97] * (MAX_INLINE_TOKENS + 1), "max_tokens": 1, "echo": True, "logprobs": 0}
    (choice,) = whole(shared, **body)
    assert len(choice["logprobs"]["tokens"]) == MAX_INLINE_TOKENS + 2
    assert joined(shared, **body) == [choice]

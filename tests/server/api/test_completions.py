"""POST /v1/completions, whole: prompts × choices, usage, the model's name, failures."""

import pytest

from tests.server.live import Live, serving


def test_a_whole_answer_has_openai_s_form(shared: Live) -> None:
    answer = shared.complete(model="fake", prompt="hello", max_tokens=3).json()
    assert answer.pop("id").startswith("cmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "text_completion",
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "text": "abc",
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
                "context_start": 0,
                "prompt_logprobs": None,
                "prompt_token_ids": None,
                "token_ids": None,
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 3,
            "total_tokens": 8,
            "prompt_tokens_details": None,
        },
        "service_tier": None,
        "system_fingerprint": None,
        "kv_transfer_params": None,
    }


def test_max_tokens_is_16_unless_given(shared: Live) -> None:
    assert shared.complete(prompt="x").json()["choices"][0]["text"] == "abcdefghijklmnop"


@pytest.mark.parametrize(
    ("prompt", "num_prompts", "num_tokens"),
    [("ab", 1, 2), (["ab", "c"], 2, 3), ([1, 2, 3], 1, 3), ([[1], [2, 3]], 2, 3)],
)
def test_every_form_of_prompt(
    shared: Live, prompt: object, num_prompts: int, num_tokens: int
) -> None:
    answer = shared.complete(prompt=prompt, n=2, max_tokens=2).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * num_prompts))
    assert answer["usage"]["prompt_tokens"] == num_tokens
    assert answer["usage"]["completion_tokens"] == 4 * num_prompts


def test_choices_stand_at_prompt_times_n_plus_choice(shared: Live) -> None:
    answer = shared.complete(prompt=["say:one", "say:two"], n=2).json()
    assert [choice["text"] for choice in answer["choices"]] == ["one", "one", "two", "two"]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}


def test_null_counts_as_absent(shared: Live) -> None:
    body = {"prompt": "x", "max_tokens": None, "temperature": None, "stream": None, "echo": None}
    assert shared.complete(**body, stop=None, model=None, seed=None).status_code == 200


def test_neutral_values_of_what_is_not_built_are_accepted(shared: Live) -> None:
    body = {
        "prompt": "x",
        "n": 2,
        "best_of": 2,
        "echo": False,
        "presence_penalty": 0.0,
        "repetition_penalty": 1,
        "logit_bias": {},
        "user": "somebody",
        "skip_special_tokens": True,
        "response_format": {"type": "text"},
        "bad_words": [],
    }
    assert shared.complete(**body).status_code == 200


def test_a_long_prompt_is_tokenised_beside_the_loop(shared: Live) -> None:
    answer = shared.complete(prompt="x" * 100_000, max_tokens=1).json()
    assert answer["usage"]["prompt_tokens"] == 100_000


def test_a_failing_request_is_a_500_that_says_no_internals(shared: Live) -> None:
    response = shared.complete(prompt=["fail", "fine"])
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert shared.complete(prompt="fine").status_code == 200


def test_an_unexpected_exception_is_a_500_that_says_no_internals() -> None:
    with serving() as live:
        live.async_engine.engine.tokenizer.encode = lambda _: 1 / 0
        response = live.complete(prompt="x")
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert "division" not in response.text
        assert live.client.get("/health").status_code == 200


def test_a_served_model_name_replaces_the_model_s_own() -> None:
    with serving(served_model_name="org/other") as live:
        assert live.complete(model="org/other", prompt="x").json()["model"] == "org/other"
        assert live.complete(model="fake", prompt="x").status_code == 404
        assert live.client.get("/v1/models/org/other").json()["id"] == "org/other"
        assert [model["id"] for model in live.client.get("/v1/models").json()["data"]] == [
            "org/other"
        ]


def test_an_unknown_model_is_a_404(shared: Live) -> None:
    for response in (shared.complete(model="gpt-9", prompt="x"), shared.client.get("/v1/models/q")):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        assert response.json()["error"]["param"] == "model"
        assert '"fake"' in response.json()["error"]["message"]


def test_ids_and_strings_that_are_sent_again_count_once() -> None:
    """A list is kept for as long as its request runs, and no list has more than the vocabulary."""
    with serving() as live:
        sent = [7, 300, 7] * 10_000
        body = {"stop_token_ids": sent, "allowed_token_ids": sent, "bad_words": ["a", "b", "a"]}
        assert live.complete(prompt="x", stop=["c"] * 40, **body).status_code == 200
        params = live.engine.seen[-1].params
    assert params.stop_token_ids == params.allowed_token_ids == (7, 300)
    assert (params.bad_words, params.stop) == (("a", "b"), ("c",))

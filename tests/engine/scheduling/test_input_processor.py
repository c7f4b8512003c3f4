"""Errors about ids and limits: each names what was sent, and what is allowed."""

from collections.abc import Sequence
from typing import Any

import pytest

from cottention.engine.errors import ParameterError
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.scheduling.input_processor import RequestLimits
from tests.short_steps import takes_short_steps

LIMITS = RequestLimits(
    num_ids=100, sampleable_ids=frozenset(range(90)), num_slots=4, max_tokens=1000
)

REFUSED: list[tuple[Sequence[int], dict[str, Any], str, str]] = [
    ([5, 100], {}, "prompt", "prompt ids must be from 0 to 99; 100 (at index 1) is not"),
    ([-1], {}, "prompt", "prompt ids must be from 0 to 99; -1 (at index 0) is not"),
    ([2**5000], {}, "prompt", "0 to 99; a number of more than 38 digits (at index 0) is not"),
    ([1], {"stop_token_ids": (3, 7, 400)}, "stop_token_ids", "to 99; 400 is not"),
    (
        [1],
        {"logit_bias": {5: 1, 123: 2}},
        "logit_bias",
        "ids in logit_bias must be from 0 to 99; 1",
    ),
    ([1], {"allowed_token_ids": (100,)}, "allowed_token_ids", "to 99; 100 is not"),
    ([1], {"allowed_token_ids": ()}, "allowed_token_ids", "it is empty: leave it out"),
    ([1], {"allowed_token_ids": (95,)}, "allowed_token_ids", "has a token; 95 has none"),
    ([1], {"allowed_token_ids": (95, 99)}, "allowed_token_ids", "95 has none, nor has any other"),
    ([1], {"n": 5}, "n", "at least 1 and at most 4 (the engine's slots); it is 5"),
    ([1], {"max_tokens": 1001}, "max_tokens", "at least 1 and at most 1000 (the engine's limit)"),
]


def check(prompt_ids: Sequence[int], params: SamplingParams) -> None:
    LIMITS.check_prompt(prompt_ids, params, None)
    LIMITS.check_params(params)


@pytest.mark.parametrize(("prompt_ids", "params", "param", "says"), REFUSED, ids=repr)
def test_an_error_names_the_id_and_the_bound(
    prompt_ids: Sequence[int], params: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(ParameterError) as caught:
        check(prompt_ids, SamplingParams(**params))
    assert caught.value.param == param
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"min_tokens": 20}, "from 0 to 16 (max_tokens); it is 20"),
        ({"logit_bias": {7: 1.0, 8: 200}}, "logit_bias of id 8 must be a finite number from -100"),
        ({"top_p": 0}, "greater than 0, up to 1; it is 0"),
        ({"top_p": -0.5}, "greater than 0, up to 1; it is -0.5"),
        ({"repetition_penalty": 0}, "greater than 0; it is 0"),
        ({"bad_words": ("fine", "")}, "at index 1 is '', of 0 characters"),
        (
            {"stop": ("a", "x" * 999)},
            "at index 1 is 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx ..., of 999",
        ),
        ({"max_tokens": "x" * 999}, "it is 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx ..."),
    ],
    ids=repr,
)
def test_an_error_of_a_parameter_quotes_the_value_in_short(params: Any, says: str) -> None:
    with pytest.raises(ParameterError) as caught:
        SamplingParams(**params)
    assert says in str(caught.value)


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids"])
def test_very_many_ids_are_checked_in_short_steps(field: str) -> None:
    fields: dict[str, Any] = {field: range(2_000_000)}
    params = SamplingParams(**fields)

    def check() -> None:
        with pytest.raises(ParameterError, match=field):
            LIMITS.check_params(params)

    assert takes_short_steps(check)

"""What a request may ask for, and which field an error names."""

import math
from typing import Any

import pytest

from cottention.engine.errors import ParameterError
from cottention.engine.sampling_params import (
    GREEDY_BELOW,
    MAX_SEED,
    MAX_STOP_LENGTH,
    MAX_TOP_K,
    SamplingParams,
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1),
        ("max_tokens", 10**9),
        ("n", 1),
        ("temperature", 0),
        ("temperature", 0.0),
        ("temperature", 1e300),
        ("top_p", 1),
        ("top_p", 5e-324),
        ("top_k", -1),
        ("top_k", MAX_TOP_K),
        ("min_p", 0),
        ("min_p", 1.0),
        ("seed", -MAX_SEED - 1),
        ("seed", MAX_SEED),
        ("seed", None),
        ("stop", ("a",) * 16),
        ("stop", ("é" * MAX_STOP_LENGTH,)),
    ],
)
def test_allowed(field: str, value: Any) -> None:
    assert getattr(SamplingParams(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 1.0),
        ("max_tokens", True),
        ("max_tokens", None),
        ("max_tokens", "16"),
        ("n", 0),
        ("n", False),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 10**400),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", None),
        ("top_p", 0),
        ("top_p", -0.0),
        ("top_p", 1.0001),
        ("top_p", math.nan),
        ("top_k", -2),
        ("top_k", MAX_TOP_K + 1),
        ("top_k", 1.5),
        ("min_p", -1e-9),
        ("min_p", 1.01),
        ("min_p", math.nan),
        ("seed", MAX_SEED + 1),
        ("seed", -MAX_SEED - 2),
        ("seed", 1.0),
        ("seed", "1"),
        ("stop", ("a",) * 17),
        ("stop", ("",)),
        ("stop", ("a", "b" * (MAX_STOP_LENGTH + 1))),
        ("stop", (1,)),
        ("stop", ("a", None)),
    ],
)
def test_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ParameterError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert field in str(caught.value)


def test_greedy_is_a_temperature_of_nearly_nothing() -> None:
    assert SamplingParams(temperature=0).is_greedy
    assert SamplingParams(temperature=GREEDY_BELOW / 2).is_greedy
    assert not SamplingParams(temperature=GREEDY_BELOW).is_greedy

"""The model's sampling defaults hold where a request names none, and nowhere else."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cottention.engine.sampling_params import SamplingParams
from cottention.server.generation.chat_template import find_template
from tests.server.live import Live, serving

DEFAULTS = {
    "temperature": 0.25,
    "top_p": 0.75,
    "top_k": 40,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "max_tokens": 3,
}
ASKED = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    with serving(template=find_template("plain", tmp_path)) as live:
        live.engine.default_sampling_params.update(DEFAULTS)
        yield live


def ask(live: Live, endpoint: str, **body: Any) -> SamplingParams:
    """The parameters that the engine gets."""
    answer = live.complete(prompt="a", **body) if endpoint == "text" else live.chat("a", **body)
    assert answer.status_code == 200, answer.text
    params: SamplingParams = live.engine.seen[-1].params
    return params


def values(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in DEFAULTS}


@pytest.mark.parametrize("endpoint", ["text", "chat"])
def test_defaults_apply_to_absent_parameters(live: Live, endpoint: str) -> None:
    assert values(ask(live, endpoint)) == DEFAULTS
    assert values(ask(live, endpoint, temperature=None, max_tokens=None)) == DEFAULTS


@pytest.mark.parametrize("endpoint", ["text", "chat"])
@pytest.mark.parametrize("name", ASKED)
def test_a_neutral_value_in_a_request_overrides_the_default(
    live: Live, endpoint: str, name: str
) -> None:
    params = ask(live, endpoint, **{name: ASKED[name]})
    assert values(params) == DEFAULTS | {name: ASKED[name]}


@pytest.mark.parametrize("endpoint", ["text", "chat"])
def test_a_request_may_exceed_the_default_max_tokens(live: Live, endpoint: str) -> None:
    assert ask(live, endpoint, max_tokens=5).max_tokens == 5


def test_a_flag_comes_before_the_model_s_default(tmp_path: Path) -> None:
    template = find_template("plain", tmp_path)
    with serving(template=template, default_max_tokens=7) as live:
        live.engine.default_sampling_params["max_tokens"] = 3
        assert ask(live, "chat").max_tokens == 7
        assert ask(live, "text").max_tokens == 3


def test_a_key_s_limit_holds_for_the_model_s_default(tmp_path: Path) -> None:
    template = find_template("plain", tmp_path)
    with serving(template=template, key_max_tokens=2) as live:
        live.engine.default_sampling_params["max_tokens"] = 30
        assert ask(live, "chat").max_tokens == 2
        assert ask(live, "text").max_tokens == 2


def test_without_defaults_nothing_changes(tmp_path: Path) -> None:
    with serving(template=find_template("plain", tmp_path)) as live:
        assert values(ask(live, "text")) == ASKED | {"max_tokens": 16}
        assert values(ask(live, "chat")) == ASKED | {"max_tokens": 1024}

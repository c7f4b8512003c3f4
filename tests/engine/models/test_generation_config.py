"""Ends of text and sampling defaults, in whichever file a model folder names them."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.models.model_folder import DEFAULT_MODEL
from cottention.engine.outputs import FinishReason
from cottention.engine.sessions.fingerprint import Fingerprint

SMALL = EngineConfig(max_slots=1)


def write(folder: Path, name: str, **fields: Any) -> None:
    path = folder / f"{name}.json"
    raw = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(raw | fields))


def ends_at(engine: Engine, token_id: int) -> bool:
    """Whether a text ends where this id is drawn."""
    params = SamplingParams(max_tokens=3, logit_bias={token_id: 100.0}, temperature=0)
    (done,) = engine.generate(["def"], params)
    return done.finish_reason is FinishReason.STOP and len(done.token_ids) == 1


@pytest.mark.parametrize(
    ("name", "fields", "more"),
    [
        ("generation_config", {"eos_token_id": 65}, {65}),
        ("generation_config", {"eos_token_id": [65, 66, 0]}, {65, 66}),
        ("tokenizer_config", {"eos_token": "b"}, {"b"}),
        ("tokenizer_config", {"eos_token": {"content": "c", "lstrip": False}}, {"c"}),
        ("special_tokens_map", {"eos_token": "d"}, {"d"}),
        ("config", {"eos_token_id": [0, 70]}, {70}),
    ],
)
def test_every_end_that_a_file_names_ends_a_text(
    folder: Path, name: str, fields: dict[str, Any], more: set[Any]
) -> None:
    write(folder, name, **fields)
    engine = Engine(folder, SMALL)
    ids = {engine.tokenizer.encode(each)[0] if isinstance(each, str) else each for each in more}
    assert set(engine.model_config.eos_token_ids) == {0} | ids
    assert all(ends_at(engine, each) for each in {0} | ids)
    assert not ends_at(engine, 90)


@pytest.mark.parametrize("value", ["1", [1, None], {"a": 1}, 1.5, True])
def test_an_end_that_is_no_id_is_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, value: Any
) -> None:
    write(folder, "generation_config", eos_token_id=value, top_k=4)
    engine = Engine(folder, SMALL)
    assert engine.model_config.eos_token_ids == (0,)
    assert engine.default_sampling_params == {"top_k": 4}
    (message,) = caplog.messages
    assert f"{folder}/generation_config.json: eos_token_id must be a whole number" in message


def test_an_end_that_the_model_lacks_is_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder, "generation_config", eos_token_id=[0, 50_256])
    assert Engine(folder, SMALL).model_config.reachable_ends == (0,)
    assert "names ids that the model does not have, which are ignored: 50256" in caplog.text


FIELDS = {
    "temperature": 0.0,
    "top_p": 0.9,
    "top_k": 50,
    "min_p": 0.1,
    "repetition_penalty": 1.2,
    "max_new_tokens": 5,
    "do_sample": True,
    "num_beams": 4,
}
PARAMS = {
    "temperature": 0.0,
    "top_p": 0.9,
    "top_k": 50,
    "min_p": 0.1,
    "repetition_penalty": 1.2,
    "max_tokens": 5,
}


def test_sampling_defaults_hold_where_nothing_is_asked(folder: Path) -> None:
    write(folder, "generation_config", **FIELDS)
    engine = Engine(folder, SMALL)
    assert engine.default_sampling_params == PARAMS
    own = engine.generate(["def"])
    assert own == engine.generate(["def"], SamplingParams(**PARAMS))  # type: ignore[arg-type]
    assert len(own[0].token_ids) == 5
    plain = Engine(folder, EngineConfig(max_slots=1, generation_config="vllm"))
    assert plain.default_sampling_params == {}
    assert len(plain.generate(["def"], SamplingParams(ignore_eos=True))[0].token_ids) == 16


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_k", 1.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
    ],
)
def test_a_default_that_no_request_may_have_is_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, field: str, value: Any
) -> None:
    write(folder, "generation_config", **{"top_k": 7, field: value})
    left = {"top_k": 7} if field != "top_k" else {}
    assert Engine(folder, SMALL).default_sampling_params == left
    (message,) = caplog.messages
    assert message.startswith(f"{folder}/generation_config.json: {field} must be ")


def test_a_default_is_at_most_what_a_request_may_have(folder: Path) -> None:
    write(folder, "generation_config", max_new_tokens=9)
    engine = Engine(folder, EngineConfig(max_slots=1, max_tokens_limit=6))
    assert engine.default_sampling_params == {"max_tokens": 6}


def fingerprint_of(folder: Path, engine: Engine) -> Fingerprint:
    return Fingerprint.of(folder, engine.tokenizer.files, engine.spec, engine.dtype)


def test_sessions_stay_valid_whatever_the_sampling(folder: Path) -> None:
    engine = Engine(folder, SMALL)
    before = fingerprint_of(folder, engine)
    write(folder, "generation_config", **FIELDS, eos_token_id=[5])
    after = Engine(folder, SMALL)
    assert fingerprint_of(folder, after) == before


def repeated(ids: Sequence[int]) -> float:
    """Which part of the groups of four tokens is a repetition of an earlier one."""
    groups = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return 1 - len(set(groups)) / len(groups)


def test_the_defaults_of_the_model_that_ships_keep_it_from_repeating_itself() -> None:
    """Greedy text of so small a model is one line over again; a bare request must not get it."""
    engine = Engine(DEFAULT_MODEL, EngineConfig(max_slots=8))
    assert engine.model_config.eos_token_ids == (0,)
    prompts, defaults = ["def __init__(self, ", "def read(path):\n"], engine.default_sampling_params
    bare = engine.generate(prompts, SamplingParams(max_tokens=64, n=4, seed=1, **defaults))
    greedy = engine.generate(prompts, SamplingParams(max_tokens=64, temperature=0))
    means = [fmean(repeated(each.token_ids) for each in some) for some in (bare, greedy)]
    assert means[0] < 0.5 * means[1]

"""Damaged model folders: each serves or ends in one line that names file and reason."""

import logging
from pathlib import Path

import pytest

from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.errors import ModelFolderError
from tests.engine.models.mutated_folders import make_good_folder, mutated_folder

FILES = (
    *("config.json", "tokenizer", "vocab.json", "merges.txt", "added_tokens.json"),
    *("weights", ".safetensors", "generation_config.json", "special_tokens_map.json"),
)

QUIET = {
    *("remove", "change_bytes", "change_value", "change_config", "drop_key"),
    *("replace_by", "older_tokenizer", "add_decoder"),
}
"""Mutations that can make a sound folder that says something else."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("good") / "model"
    make_good_folder(Path(__file__).parents[2] / "data" / "golden" / "cottention-gptj", target)
    return target


def facts(folder: Path) -> object:
    """What a folder says and generates."""
    engine = Engine(folder, EngineConfig(max_slots=1))
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    outputs = engine.generate(["def f(\u00e9)<|endoftext|>"], params)
    assert len(outputs[0].token_ids) == 3
    return outputs, engine.model_config.reachable_ends, engine.default_sampling_params


@pytest.mark.parametrize(
    "numbers",
    [range(100), pytest.param(range(100, 1000), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_a_mutated_folder_serves_or_is_refused_in_one_line(
    good: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, numbers: range
) -> None:
    expected = facts(good)
    num_served = 0
    for number in numbers:
        folder = tmp_path / f"m{number}"
        what = mutated_folder(good, number, folder)
        caplog.clear()
        try:
            with caplog.at_level(logging.WARNING):
                found = facts(folder)
        except ModelFolderError as error:
            message = str(error)
            rest = message.replace(str(folder), "", 1)
            assert "\n" not in message, what
            assert str(folder) in message, what
            assert any(name in rest for name in FILES), (what, message)
        else:
            num_served += 1
            assert all("\n" not in each for each in caplog.messages), what
            if found != expected and not caplog.messages:
                made = set(what.partition(": ")[2].split(", "))
                assert made & QUIET, f"{what}: another model, and nothing was said"
    assert 0.2 * len(numbers) < num_served < 0.8 * len(numbers)

"""What a config.json may say, what a state costs, how many slots a memory holds."""

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from cottention.engine.config import DEFAULT_SLOTS, EngineConfig
from cottention.engine.errors import ConfigurationError, ModelFolderError
from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.registry import parse_config, read_config
from cottention.engine.state.spec import StateSpec, recurrence_tensors

RAW: dict[str, Any] = {
    "model_type": "gptj",
    "vocab_size": 50_400,
    "n_embd": 1024,
    "n_layer": 20,
    "n_head": 16,
    "n_positions": 1024,
    "rotary_dim": 64,
    "n_inner": 3072,
}


DIVIDED = recurrence_tensors(layers=2, heads=3, value_width=8, key_width=16, has_denominator=True)


def read(**changes: Any) -> GPTJConfig:
    config = parse_config(RAW | changes, "config.json")
    assert isinstance(config, GPTJConfig)
    return config


def test_golden_config_is_read(gptj_folder: Path) -> None:
    raw = json.loads((gptj_folder / "config.json").read_text())
    config = read_config(gptj_folder)
    assert isinstance(config, GPTJConfig)
    assert (config.vocab_size, config.n_layer) == (raw["vocab_size"], raw["n_layer"])
    assert config.head_dim * config.n_head == config.n_embd
    assert config.eos_token_ids == (raw["eos_token_id"],)


def test_defaults_of_gptj() -> None:
    config = read(n_inner=None, rotary_dim=None)
    assert config.n_inner == 4 * 1024
    assert config.rotary_dim == config.head_dim == 64
    assert config.attention_type == "cottention"
    assert config.layer_norm_epsilon == 1e-5


@pytest.mark.parametrize(
    ("eos", "ids"), [(None, ()), (0, (0,)), ([1, 2], (1, 2)), ([], ()), (50_256, (50_256,))]
)
def test_eos_token_id_is_a_number_a_list_or_null(eos: Any, ids: tuple[int, ...]) -> None:
    assert read(eos_token_id=eos).eos_token_ids == ids


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        ({}, "float32"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, "bfloat16"),
        ({"torch_dtype": None}, "float32"),
        ({"torch_dtype": ["float16"]}, "['float16']"),
    ],
)
def test_dtype_of_the_checkpoint(stored: dict[str, Any], dtype: str) -> None:
    assert read(**stored).torch_dtype == dtype


def test_the_window_ends_where_weights_would_turn_negative() -> None:
    length = RAW["n_positions"]
    plain = read()
    assert (plain.window, plain.max_exact_length) == (length, None)
    cosformer = read(attention_type="cosformer")
    assert (cosformer.window, cosformer.max_exact_length) == (length, length)
    short = read(attention_type="cosformer", cosformer_max_length=100)
    assert (short.window, short.max_exact_length) == (100, 100)
    far = read(attention_type="cosformer", cosformer_max_length=length + 1)
    assert (far.window, far.max_exact_length) == (length, length + 1)
    assert read(cosformer_max_length=100).max_exact_length is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ["gptj"]}, "model_type is ['gptj']"),
        (
            {"attention_type": "hyena"},
            "attention_type 'hyena' is not one of: cosformer",
        ),
        ({"attention_type": ["cottention"]}, "attention_type ['cottention'] is not one of"),
        ({"attention_type": None}, "attention_type None is not one of"),
        ({"activation_function": "relu"}, "activation_function must be 'gelu_new'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be False"),
        ({"n_embd": 0}, "n_embd must be a whole number from 1, it is 0"),
        ({"n_layer": -3}, "n_layer must be a whole number from 1"),
        ({"n_head": "16"}, "n_head must be a whole number from 1, it is '16'"),
        ({"vocab_size": 1e3}, "vocab_size must be a whole number from 1"),
        ({"vocab_size": True}, "vocab_size must be a whole number from 1, it is True"),
        ({"n_positions": None}, "n_positions must be a whole number from 1, it is None"),
        ({"n_inner": 0}, "n_inner must be a whole number from 1"),
        ({"n_head": 24}, "n_embd (1024) must be a multiple of n_head (24)"),
        ({"n_head": 2048}, "n_embd (1024) must be a multiple of n_head (2048)"),
        ({"rotary_dim": 7}, "rotary_dim (7) must be even and at most the head's width (64)"),
        ({"rotary_dim": 66}, "rotary_dim (66) must be even and at most the head's width (64)"),
        ({"rotary_dim": -2}, "rotary_dim must be a whole number from 0, it is -2"),
        ({"attention_bias": 1}, "attention_bias must be true or false, it is 1"),
        (
            {"attention_type": "cosformer", "cosformer_max_length": 0},
            "cosformer_max_length must be a whole number from 1",
        ),
        ({"n_positions": 1}, "n_positions, and cosformer_max_length, must be from 2"),
        (
            {"attention_type": "cosformer", "cosformer_max_length": 1},
            "n_positions, and cosformer_max_length, must be from 2",
        ),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon must be a number between 0 and 1"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon must be a number between 0 and 1"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon must be a number between 0 and 1"),
        ({"eos_token_id": "<|end|>"}, "eos_token_id must be a whole number, a list of them"),
        ({"eos_token_id": [0, None]}, "eos_token_id must be a whole number, a list of them"),
    ],
)
def test_a_faulty_field_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelFolderError) as caught:
        read(**changes)
    assert str(caught.value).startswith("config.json: ")
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["vocab_size", "n_embd", "n_layer", "n_head", "n_positions"])
def test_sizes_are_required(name: str) -> None:
    with pytest.raises(ModelFolderError, match=f"{name} must be a whole number"):
        GPTJConfig.from_dict({k: v for k, v in RAW.items() if k != name}, "config.json")


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"has no config\.json: give a Hugging Face"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b'{"model_type": "\xff\xfe"}', "cannot be read as JSON"),
        (b"[1, 2]", "must hold a JSON object"),
        (b'"gptj"', "must hold a JSON object"),
        (b"null", "must hold a JSON object"),
    ],
)
def test_config_that_is_no_json_object(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelFolderError, match=words) as caught:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_config_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelFolderError, match="cannot be read as JSON"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, 5_242_880), ({"n_embd": 2048, "rotary_dim": 64, "n_inner": None}, 20_971_520)],
)
def test_state_bytes_of_the_published_models(changes: dict[str, Any], expected: int) -> None:
    spec = read(**changes).state_spec()
    assert spec.bytes_per_slot == expected
    assert spec.itemised_bytes() == {"state": expected, "denominator": 0, "spare": 0}


def test_denominators_are_counted() -> None:
    spec = StateSpec(DIVIDED)
    state, denominator = 2 * 3 * 8 * 16 * 4, 2 * 3 * 16 * 4
    assert spec.itemised_bytes() == {"state": state, "denominator": denominator, "spare": 0}
    assert spec.bytes_per_slot == state + denominator


def test_a_spare_is_as_large_as_all_the_rest() -> None:
    spec = StateSpec(DIVIDED, has_spare=True)
    assert spec.itemised_bytes()["spare"] * 2 == spec.bytes_per_slot


@pytest.mark.parametrize(
    ("config", "slots"),
    [
        (EngineConfig(), DEFAULT_SLOTS),
        (EngineConfig(max_slots=3), 3),
        (EngineConfig(state_memory=5_242_880), 1),
        (EngineConfig(state_memory=2 * 5_242_880 - 1), 1),
        (EngineConfig(state_memory=2**30), 204),
    ],
)
def test_slots_by_number_or_by_memory(config: EngineConfig, slots: int) -> None:
    assert config.num_slots(read().state_spec()) == slots


def test_memory_that_holds_no_state() -> None:
    with pytest.raises(ConfigurationError, match="--state-memory 5242879 is less than the 5242880"):
        EngineConfig(state_memory=5_242_879).num_slots(read().state_spec())


def test_configurations_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        read().n_embd = 8  # type: ignore[misc]


def test_prompts_beside_running_choices_are_bounded_by_device() -> None:
    assert EngineConfig().prompt_tokens_beside("cpu") is None
    assert EngineConfig(max_batch_tokens=100).prompt_tokens_beside("cuda:0") == 100
    assert EngineConfig(max_prefill_tokens=7).prompt_tokens_beside("cuda:0") == 7

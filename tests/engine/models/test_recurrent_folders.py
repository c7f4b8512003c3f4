"""Folders of Mamba and flash-linear-attention: spellings that are read, and what is refused.

Everything that is refused is one line that names the file, what is wrong and what is allowed.
"""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.errors import ModelFolderError
from cottention.engine.models.mamba.config import Mamba2Config, MambaConfig
from cottention.engine.models.registry import family_of, parse_config, read_config
from cottention.engine.models.weight_files import read_weights
from tests.engine.making import FAMILIES, family_folder
from tests.engine.windows import say

PARAMS = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
PROMPT = [5, 80, 17]


def config_of(model_type: str) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((family_folder(model_type) / "config.json").read_text())
    return raw


def copied(model_type: str, target: Path) -> Path:
    shutil.copytree(family_folder(model_type), target)
    return target


def said(folder: Path, **settings: Any) -> list[int]:
    engine = Engine(folder, EngineConfig(max_slots=1, **settings))
    return list(engine.generate([PROMPT], PARAMS)[0].token_ids)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("mamba2", {"hidden_act": "relu"}, "hidden_act must be 'silu' or 'swish', it is 'relu'"),
        ("mamba2", {"rmsnorm": False}, "rmsnorm must be True, it is False"),
        ("mamba2", {"norm_before_gate": True}, "norm_before_gate must be False, it is True"),
        ("mamba2", {"D_has_hdim": True}, "D_has_hdim must be False, it is True"),
        ("mamba2", {"num_heads": 3}, "num_heads · head_dim (48) must be expand · hidden_size (64)"),
        ("mamba2", {"n_groups": 3}, "num_heads (4) must be a multiple of n_groups (3)"),
        ("mamba2", {"n_groups": None}, "n_groups must be a whole number from 1, it is None"),
        ("mamba2", {"time_step_limit": [1, 0]}, "time_step_limit must be two numbers from 0"),
        ("mamba2", {"time_step_limit": [0, math.nan]}, "time_step_limit must be two numbers"),
        ("mamba2", {"time_step_limit": 5}, "time_step_limit must be two numbers from 0"),
        ("mamba2", {"conv_kernel": 1}, "conv_kernel must be a whole number from 2, it is 1"),
        ("mamba", {"hidden_act": "gelu"}, "hidden_act must be 'silu' or 'swish', it is 'gelu'"),
        ("mamba", {"time_step_rank": "all"}, "time_step_rank must be a whole number from 1"),
        ("gla", {"attn": {"layers": [1]}}, "attn must be None, it is {'layers': [1]}"),
        ("gla", {"attnres_block_size": 4}, "attnres_block_size must be None, it is 4"),
        ("gla", {"feature_map": "relu"}, "feature_map must be None, it is 'relu'"),
        ("gla", {"hidden_act": "powlu"}, "hidden_act must be 'swish' or 'silu', it is 'powlu'"),
        ("gla", {"num_kv_heads": 1}, "num_kv_heads must be None or 2, it is 1"),
        ("gla", {"use_gv": True}, "use_gv must be False, it is True"),
        ("gla", {"expand_k": 0.001}, "expand_k (0.001) times 64 must be from 1"),
        ("retnet", {"expand_v": 0.78}, "hidden_size · expand_v (37)"),
        ("retnet", {"num_heads": 16}, "key width (3) must be even"),
        ("hgrn2", {"expand_ratio": 32}, "hidden_size (48) must be a multiple of expand_ratio (32)"),
        ("delta_net", {"qk_norm": "l1"}, "qk_norm must be 'l2' or 'sum', it is 'l1'"),
        ("delta_net", {"qk_activation": 5}, "qk_activation must be 'silu' or 'relu' or"),
        ("delta_net", {"norm_eps": 2}, "norm_eps must be a number between 0 and 1, it is 2"),
        ("gated_deltanet", {"num_v_heads": 3}, "num_v_heads (3) must be a multiple of num_heads"),
        ("gated_deltanet", {"output_gate_activation": "relu"}, "output_gate_activation must be"),
        ("gated_deltanet", {"expand_v": "two"}, "expand_v must be a finite number, it is 'two'"),
    ],
)
def test_what_would_be_another_arithmetic_is_refused(
    model_type: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelFolderError) as caught:
        parse_config(config_of(model_type) | changes, "here/config.json")
    assert str(caught.value).startswith("here/config.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('[0.0, {"__float__": "Infinity"}]', (0.0, math.inf)),
        ("[0.0, Infinity]", (0.0, math.inf)),
        ("[0.001, 0.1]", (0.001, 0.1)),
        ("null", (0.0, math.inf)),
    ],
)
@pytest.mark.parametrize("name", ["time_step_limit", "dt_limit"])
def test_the_limit_of_the_time_step_is_read_in_every_spelling(
    written: str, expected: tuple[float, float], name: str, tmp_path: Path
) -> None:
    """transformers 5, older versions, and flash-linear-attention under its own names."""
    raw = {each: value for each, value in config_of("mamba2").items() if "limit" not in each}
    epsilon = raw.pop("layer_norm_epsilon")
    raw["norm_eps" if name == "dt_limit" else "layer_norm_epsilon"] = 2 * epsilon
    text = json.dumps(raw).rstrip("}") + f', "{name}": {written}}}'
    (tmp_path / "config.json").write_text(text)
    config = read_config(tmp_path)
    assert isinstance(config, Mamba2Config)
    assert config.time_step_limit == expected
    assert config.layer_norm_epsilon == 2 * epsilon


def test_sizes_that_a_configuration_leaves_open() -> None:
    raw = config_of("mamba") | {"time_step_rank": "auto", "intermediate_size": None}
    raw = raw | {"hidden_size": 100, "conv_kernel": None}
    config = parse_config(raw, "config.json")
    assert isinstance(config, MambaConfig)
    assert (config.time_step_rank, config.intermediate_size, config.conv_kernel) == (7, 200, 4)
    open_ = parse_config(config_of("gla") | {"intermediate_size": None}, "config.json")
    assert open_.intermediate_size == 256, "64 · 4 · 2/3, rounded up"  # type: ignore[attr-defined]


def test_the_limit_of_the_time_step_is_used(tmp_path: Path) -> None:
    folder = copied("mamba2", tmp_path / "model")
    whole = said(folder)
    raw = config_of("mamba2") | {"time_step_limit": [0.0, 1e-6]}
    (folder / "config.json").write_text(json.dumps(raw))
    assert said(folder) != whole


ORIGINAL = {"d_model": 8, "n_layer": 1, "vocab_size": 9, "ssm_cfg": {"layer": "Mamba2"}}


def test_the_mamba_project_s_own_format_is_refused_with_its_conversion(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError) as caught:
        parse_config(ORIGINAL, "here/config.json")
    assert "here/config.json: this is a config.json of the Mamba project's own format" in str(
        caught.value
    )
    assert "convert_mamba2_ssm_checkpoint_to_pytorch.py" in str(caught.value)
    folder = copied("mamba", tmp_path / "model")
    weights = read_weights(folder)
    weights["backbone.embedding.weight"] = weights.pop("backbone.embeddings.weight")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelFolderError) as caught:
        said(folder)
    assert "backbone.embedding.weight is a name of the Mamba project's own format" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_weights_that_are_not_the_model_s_are_refused(model_type: str, tmp_path: Path) -> None:
    """Missing, additional, misshapen; and a file that ends too early."""
    folder = copied(model_type, tmp_path / "model")
    path = folder / "model.safetensors"
    weights = read_weights(folder)
    first, second, third = sorted(name for name in weights if "norm" not in name)[1:4]
    changed = {name: weight for name, weight in weights.items() if name != first}
    changed |= {
        second: weights[second].unsqueeze(0),
        "x.bias": torch.zeros(1),
        third: weights[third].to(torch.int64),
    }
    save_file(changed, path)
    with pytest.raises(ModelFolderError) as caught:
        said(folder)
    message = str(caught.value)
    assert f"missing: {first}; unexpected: x.bias; of another shape: {second}" in message
    assert f"not of floating point: {third} int64" in message
    assert "\n" not in message
    save_file(weights, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelFolderError, match=r"model\.safetensors is damaged") as caught:
        said(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_head_may_be_the_embeddings(model_type: str, tmp_path: Path) -> None:
    """Tied with and without a head in the file, and a file without one that does not say so."""
    folder = copied(model_type, tmp_path / "model")
    weights = read_weights(folder)
    weights.pop("lm_head.weight", None)
    [embeddings] = [name for name in weights if name.endswith("embeddings.weight")]
    answers = []
    for is_tied, has_head in ((True, False), (True, True), (False, False)):
        head = {"lm_head.weight": weights[embeddings].clone()} if has_head else {}
        save_file(weights | head, folder / "model.safetensors")
        raw = config_of(model_type) | {"tie_word_embeddings": is_tied}
        (folder / "config.json").write_text(json.dumps(raw))
        answers.append(said(folder))
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("model_type", ["gla", "retnet"])
def test_norms_may_have_been_fused_with_their_gates(model_type: str, tmp_path: Path) -> None:
    folder = copied(model_type, tmp_path / "model")
    expected = said(folder)
    weights = read_weights(folder)
    names = re.compile(r"g_norm(_swish_gate)?\.")
    plain, fused = (
        {names.sub(f"{name}.", each): x.clone() for each, x in weights.items()}
        for name in ("g_norm", "g_norm_swish_gate")
    )
    assert plain.keys() != fused.keys()
    for each in (plain, fused):
        save_file(each, folder / "model.safetensors")
        assert said(folder) == expected
    save_file(plain | fused, folder / "model.safetensors")
    with pytest.raises(ModelFolderError, match=r"unexpected: .*g_norm_swish_gate"):
        said(folder)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mamba", {"use_bias": True, "use_conv_bias": False}),
        ("mamba2", {"use_bias": True, "use_conv_bias": False}),
        ("gla", {"use_short_conv": True, "use_output_gate": False, "clamp_min": -0.1}),
        ("gla", {"elementwise_affine": False}),
        ("retnet", {"use_output_gate": False}),
        ("hgrn2", {"use_short_conv": True, "use_lower_bound": False}),
        ("delta_net", {"use_gate": True, "use_beta": False, "qk_norm": "sum"}),
        ("delta_net", {"qk_activation": "elu", "allow_neg_eigval": True}),
        ("delta_net", {"qk_activation": "relu", "use_short_conv": False}),
        ("gated_deltanet", {"use_gate": False, "use_short_conv": False}),
        ("gated_deltanet", {"output_gate_activation": "sigmoid", "num_v_heads": None}),
    ],
)
def test_options_that_no_golden_case_has(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """A prompt read at once says what it says token by token, and the shapes agree."""
    folder = copied(model_type, tmp_path / "model")
    raw = config_of(model_type) | changes
    (folder / "config.json").write_text(json.dumps(raw))
    config = read_config(folder)
    torch.manual_seed(1)
    model = family_of(config).implementation().build(config)
    weights = {name: torch.randn_like(x) / 4 for name, x in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    engine = Engine(folder, EngineConfig(max_slots=2))
    whole = list(engine.generate([PROMPT], PARAMS)[0].token_ids)
    assert len(whole) == PARAMS.max_tokens
    again = list(engine.generate([[*PROMPT, *whole[:3]]], PARAMS)[0].token_ids)
    assert again[:2] == whole[3:]


Sizes = dict[str, Any]
STATES: dict[str, Callable[[Sizes], tuple[int, int]]] = {
    "mamba2": lambda c: (
        2 * c["hidden_size"] * c["state_size"],
        2 * c["hidden_size"] + 2 * c["n_groups"] * c["state_size"],
    ),
    "mamba": lambda c: (c["intermediate_size"] * c["state_size"], c["intermediate_size"]),
    "gla": lambda c: (c["hidden_size"] ** 2 // 2 // c["num_heads"], 0),
    "retnet": lambda c: (2 * c["hidden_size"] ** 2 // c["num_heads"], 0),
    "hgrn2": lambda c: (c["hidden_size"] * c["expand_ratio"], 0),
    "delta_net": lambda c: (c["hidden_size"] ** 2 // c["num_heads"], 3 * c["hidden_size"]),
    "gated_deltanet": lambda c: (
        c["num_v_heads"] * c["head_dim"] ** 2,
        (2 * c["num_heads"] + c["num_v_heads"]) * c["head_dim"],
    ),
}
"""Numbers of a layer's state, and of each input that its convolutions keep, by the papers."""


@pytest.mark.parametrize("model_type", STATES)
def test_a_session_takes_what_its_tensors_do(model_type: str) -> None:
    raw = config_of(model_type)
    state, tails = STATES[model_type](raw)
    engine = Engine(family_folder(model_type), EngineConfig(max_slots=3))
    items = engine.spec.itemised_bytes()
    layers = 4 * raw["num_hidden_layers"]
    assert items["state"] == layers * state
    assert items.get("conv", 0) == 3 * layers * tails
    assert sum(items.values()) == engine.spec.bytes_per_slot
    assert engine.pool.nbytes == 3 * engine.spec.bytes_per_slot
    assert sum(x.nbytes for x in engine.pool.tensors.values()) == engine.pool.nbytes


@pytest.mark.parametrize("model_type", FAMILIES)
def test_weights_in_bfloat16_are_served(model_type: str) -> None:
    """Matrices in bfloat16; state, decays and norms in float32: a little is changed, not more."""
    likeliest = []
    for dtype in ("float32", "bfloat16"):
        engine = Engine(family_folder(model_type), EngineConfig(max_slots=1, dtype=dtype))
        [(_, told)] = say(engine, PROMPT, 1)
        likeliest.append(told.top[0][1])
        assert engine.pool.tensors["state"].dtype == torch.float32
    assert 0 < abs(likeliest[0] - likeliest[1]) < 0.1

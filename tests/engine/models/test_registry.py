"""Which model families there are, and that each says what its sessions' numbers depend on."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import pytest

from cottention.engine.errors import ModelFolderError
from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.registry import (
    FAMILIES,
    OTHERS,
    family_of,
    find_family,
    parse_config,
    read_config,
)

FROM_WEIGHTS = {"low_ranks"}
"""Sizes that are in the weights, whose hash a session has, and in no configuration."""

NOT_ARITHMETIC = {"eos_token_ids", "torch_dtype"}
"""Where texts end, and how weights are stored; the layout has the dtype that they are served in."""


@dataclass(frozen=True, slots=True)
class LaterConfig(GPTJConfig):
    """A family's configuration after two settings were added to it."""

    optional_arithmetic_fields: ClassVar[Mapping[str, object]] = {"logit_scale": 1.0}

    logit_scale: float = 1.0
    comment: str = ""


SHAPE = {
    "vocab_size": 9,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 16,
    "rotary_dim": 4,
    "n_inner": 32,
}


@pytest.mark.parametrize("model_type", ["rwkv9", None, ["gptj"], 5, ""])
def test_an_unknown_model_type_is_refused_with_those_that_are_served(model_type: object) -> None:
    with pytest.raises(ModelFolderError) as caught:
        parse_config({"model_type": model_type}, "here/config.json")
    message = str(caught.value)
    assert message.startswith(f"here/config.json: model_type is {model_type!r}, ")
    assert message.endswith(f"supported are: {', '.join(map(repr, sorted(FAMILIES)))}")


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("xlstm", "xLSTM"), ("minimax", "MiniMax"), ("rwkv6", "RWKV-6"), ("jamba", "Jamba")],
)
def test_what_people_may_try_is_refused_by_its_name(model_type: str, name: str) -> None:
    with pytest.raises(ModelFolderError, match=rf"is '{model_type}' \({name}.*supported are: .*"):
        parse_config({"model_type": model_type}, "config.json")
    assert not OTHERS.keys() & FAMILIES.keys()


def test_a_family_is_found_under_its_name_and_by_its_configuration(gptj_folder: Path) -> None:
    for name, family in FAMILIES.items():
        assert find_family(name, "config.json") is family
        assert family.model_type == family.config.model_type == name
    assert family_of(read_config(gptj_folder)) is FAMILIES["gptj"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_field_is_arithmetic_or_known_not_to_be(name: str) -> None:
    """A field that is in neither list would change states under an unchanged fingerprint."""
    config = FAMILIES[name].config
    listed = {*config.arithmetic_fields, *config.optional_arithmetic_fields}
    assert listed | NOT_ARITHMETIC == {field.name for field in fields(config)} - FROM_WEIGHTS
    assert not listed & NOT_ARITHMETIC


def test_the_arithmetic_of_a_gptj_is_what_stored_sessions_have() -> None:
    """Another text for the same model would refuse every session that is stored."""
    assert GPTJConfig(**SHAPE).arithmetic() == (
        "model_type=gptj vocab_size=9 n_embd=8 n_layer=1 n_head=2 n_positions=16 rotary_dim=4"
        " n_inner=32 layer_norm_epsilon=1e-05 attention_type=cottention attention_bias=False"
        " cosformer_max_length=None"
    )


def test_a_new_setting_with_its_earlier_value_leaves_sessions_valid() -> None:
    before, after = GPTJConfig(**SHAPE), LaterConfig(**SHAPE)
    assert after.arithmetic() == before.arithmetic()
    assert LaterConfig(**SHAPE, comment="no number").arithmetic() == before.arithmetic()
    changed = LaterConfig(**SHAPE, logit_scale=2.0).arithmetic()
    assert changed == f"{before.arithmetic()} logit_scale=2.0"

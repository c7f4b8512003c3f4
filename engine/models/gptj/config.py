"""The configuration of a GPT-J with some kind of attention, read from its config.json.

Loads no torch. Everything here raises ModelFolderError; `where` names the file in the message.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from cottention.engine.errors import ModelFolderError
from cottention.engine.models.config import (
    MAX_SIZE,
    ModelConfig,
    epsilon,
    size,
    switch,
    token_ids,
)
from cottention.engine.models.gptj.attention_kinds import ATTENTION_KINDS, RECURRENT_KINDS
from cottention.engine.models.gptj.feature_maps.base import FeatureMap
from cottention.engine.models.gptj.feature_maps.random_features import RandomFeatures
from cottention.engine.settings.declaration import shown
from cottention.engine.state.spec import StateTensor, recurrence_tensors


@dataclass(frozen=True, slots=True)
class GPTJConfig(ModelConfig):
    """Shape of a GPT-J with attention of some kind, under the names that its config.json uses."""

    model_type: ClassVar[str] = "gptj"
    arithmetic_fields: ClassVar[tuple[str, ...]] = (
        "vocab_size",
        "n_embd",
        "n_layer",
        "n_head",
        "n_positions",
        "rotary_dim",
        "n_inner",
        "layer_norm_epsilon",
        "attention_type",
        "attention_bias",
        "cosformer_max_length",
    )
    optional_arithmetic_fields: ClassVar[Mapping[str, object]] = {"num_random_features": None}

    n_embd: int
    n_layer: int
    n_head: int
    n_positions: int
    rotary_dim: int
    n_inner: int
    layer_norm_epsilon: float = 1e-5
    attention_type: str = "cottention"
    attention_bias: bool = False
    cosformer_max_length: int | None = None
    num_random_features: int | None = None

    @property
    def head_dim(self) -> int:
        """Channels per head, D."""
        return self.n_embd // self.n_head

    @property
    def trained_length(self) -> int:
        return self.n_positions

    @property
    def feature_map(self) -> FeatureMap:
        """The kind of attention that `attention_type` names."""
        return ATTENTION_KINDS[self.attention_type]

    @property
    def window(self) -> int:
        return min(self.n_positions, self.max_exact_length or self.n_positions)

    @property
    def max_exact_length(self) -> int | None:
        return self.feature_map.max_exact_length(self)

    def state_tensors(self) -> tuple[StateTensor, ...]:
        return recurrence_tensors(
            layers=self.n_layer,
            heads=self.n_head,
            value_width=self.feature_map.value_width(self),
            key_width=self.feature_map.key_width(self),
            has_denominator=self.feature_map.has_denominator,
        )

    def description(self) -> dict[str, str]:
        longest = self.max_exact_length
        limit = "" if longest is None else f", M = {longest:,}"
        return {
            "attention": f"{self.attention_type}{limit}",
            "shape": f"{self.n_layer} layers of {self.n_head} heads of {self.head_dim}",
        }

    def check_served(self, where: str) -> None:
        if not self.feature_map.is_recurrent:
            raise ModelFolderError(
                f"{where}: attention_type {self.attention_type!r} is for training and benchmarks"
                " only: it has no state of fixed size to serve from. Served are:"
                f" {', '.join(sorted(RECURRENT_KINDS))}"
            )

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str) -> Self:
        _check_switches(raw, where)
        sizes = {name: size(raw, name, where, most=most) for name, most in _SIZES.items()}
        config = cls(
            **sizes,
            rotary_dim=size(raw, "rotary_dim", where, default=_GPTJ_ROTARY_DIM, least=0),
            n_inner=size(raw, "n_inner", where, default=4 * sizes["n_embd"]),
            layer_norm_epsilon=epsilon(raw, "layer_norm_epsilon", where, default=1e-5),
            eos_token_ids=token_ids(raw, "eos_token_id", where),
            attention_type=raw.get("attention_type", "cottention"),
            torch_dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
            attention_bias=switch(raw, "attention_bias", where),
            cosformer_max_length=_max_length(raw, where),
            num_random_features=_num_features(raw, sizes["n_embd"] // sizes["n_head"], where),
        )
        _check_shape(config, where)
        return config


_GPTJ_ROTARY_DIM = 64
"""What transformers takes where a GPT-J's config.json does not say."""

_SIZES = {
    "vocab_size": MAX_SIZE,
    "n_embd": 2**20,
    "n_layer": 4096,
    "n_head": 2**20,
    "n_positions": MAX_SIZE,
}
"""Required sizes and their limits: beyond them a damaged number would take minutes or overflow."""


def _check_switches(raw: dict[str, Any], where: str) -> None:
    """Refuse attention of an unknown kind, and settings of a GPT-J that are not implemented."""
    attention = raw.get("attention_type", "cottention")
    if not isinstance(attention, str) or attention not in ATTENTION_KINDS:
        known = ", ".join(sorted(ATTENTION_KINDS))
        raise ModelFolderError(f"{where}: attention_type {shown(attention)} is not one of: {known}")
    for name, allowed in (("activation_function", "gelu_new"), ("tie_word_embeddings", False)):
        if raw.get(name, allowed) != allowed:
            raise ModelFolderError(f"{where}: {name} must be {allowed!r}, it is {shown(raw[name])}")


def _max_length(raw: dict[str, Any], where: str) -> int | None:
    if raw.get("attention_type") != "cosformer":
        return None
    return size(raw, "cosformer_max_length", where, default=raw["n_positions"])


MAX_RANDOM_FEATURES = 2**16


def _num_features(raw: dict[str, Any], head_dim: int, where: str) -> int | None:
    kind = ATTENTION_KINDS[raw.get("attention_type", "cottention")]
    if not isinstance(kind, RandomFeatures):
        return None
    default = kind.default_num_features(head_dim)
    return size(raw, "num_random_features", where, default=default, most=MAX_RANDOM_FEATURES)


def _check_shape(config: GPTJConfig, where: str) -> None:
    if config.n_embd % config.n_head:
        raise ModelFolderError(
            f"{where}: n_embd ({config.n_embd}) must be a multiple of n_head ({config.n_head})"
        )
    if config.rotary_dim % 2 or config.rotary_dim > config.head_dim:
        raise ModelFolderError(
            f"{where}: rotary_dim ({config.rotary_dim}) must be even and at most the head's width"
            f" ({config.head_dim})"
        )
    if config.window < 2:
        raise ModelFolderError(f"{where}: n_positions, and cosformer_max_length, must be from 2")

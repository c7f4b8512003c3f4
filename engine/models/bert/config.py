"""The configuration of a BERT with linear attention, read from its config.json. Loads no torch.

Everything here raises ModelFolderError; `where` names the file in the message.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from cottention.engine.errors import ModelFolderError
from cottention.engine.models.config import (
    MAX_SIZE,
    ModelConfig,
    epsilon,
    size,
    token_ids,
)
from cottention.engine.settings.declaration import shown
from cottention.engine.state.spec import StateTensor, recurrence_tensors

ATTENTION_TYPES = ("cosformer", "cottention")


@dataclass(frozen=True, slots=True)
class BertConfig(ModelConfig):
    """Shape of a bidirectional encoder, under the names that its config.json uses."""

    model_type: ClassVar[str] = "bert"
    is_encoder: ClassVar[bool] = True
    arithmetic_fields: ClassVar[tuple[str, ...]] = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "type_vocab_size",
        "layer_norm_eps",
        "attention_type",
        "cosformer_max_length",
        "tie_word_embeddings",
    )

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    attention_type: str = "cottention"
    cosformer_max_length: int | None = None
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        """Channels per head, D."""
        return self.hidden_size // self.num_attention_heads

    @property
    def trained_length(self) -> int:
        return self.max_position_embeddings

    @property
    def max_exact_length(self) -> int | None:
        """The table of positions has no more places."""
        return self.max_position_embeddings

    @property
    def half_wave_length(self) -> int:
        """cosFormer's M."""
        return self.cosformer_max_length or self.max_position_embeddings

    def state_tensors(self) -> tuple[StateTensor, ...]:
        """Of one layer: a layer's state is not needed once it has been read."""
        is_cosformer = self.attention_type == "cosformer"
        return recurrence_tensors(
            layers=1,
            heads=self.num_attention_heads,
            value_width=self.head_dim,
            key_width=self.head_dim * (2 if is_cosformer else 1),
            has_denominator=is_cosformer,
        )

    def description(self) -> dict[str, str]:
        limit = ""
        if self.attention_type == "cosformer":
            limit = f", M = {self.half_wave_length:,}"
        heads = f"{self.num_attention_heads} heads of {self.head_dim}"
        return {
            "attention": f"{self.attention_type}, bidirectional{limit}",
            "shape": f"{self.num_hidden_layers} layers of {heads}",
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str) -> Self:
        _check_switches(raw, where)
        sizes = {name: size(raw, name, where, most=most) for name, most in _SIZES.items()}
        max_length = None
        if raw.get("attention_type") == "cosformer":
            default = sizes["max_position_embeddings"]
            max_length = size(raw, "cosformer_max_length", where, default=default)
        config = cls(
            **sizes,
            type_vocab_size=size(raw, "type_vocab_size", where, default=2, most=2**20),
            layer_norm_eps=epsilon(raw, "layer_norm_eps", where, default=1e-12),
            eos_token_ids=token_ids(raw, "eos_token_id", where),
            attention_type=raw.get("attention_type", "cottention"),
            torch_dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
            cosformer_max_length=max_length,
            tie_word_embeddings=_is_tied(raw, where),
        )
        _check_shape(config, where)
        return config


_SIZES = {
    "vocab_size": MAX_SIZE,
    "hidden_size": 2**20,
    "num_hidden_layers": 4096,
    "num_attention_heads": 2**20,
    "intermediate_size": MAX_SIZE,
    "max_position_embeddings": MAX_SIZE,
}
"""Required sizes and their limits: beyond them a damaged number would take minutes or overflow."""

_SWITCHES = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
"""Settings of a BERT that change its arithmetic, each with the value that is implemented."""


def _is_tied(raw: dict[str, Any], where: str) -> bool:
    """Whether the predictions' decoder may be that of the word embeddings; true by default."""
    value = raw.get("tie_word_embeddings", True)
    if not isinstance(value, bool):
        raise ModelFolderError(
            f"{where}: tie_word_embeddings must be true or false, it is {shown(value)}"
        )
    return value


def _check_switches(raw: dict[str, Any], where: str) -> None:
    attention = raw.get("attention_type", "cottention")
    if attention not in ATTENTION_TYPES:
        known = ", ".join(ATTENTION_TYPES)
        raise ModelFolderError(f"{where}: attention_type {shown(attention)} is not one of: {known}")
    for name, allowed in _SWITCHES.items():
        value = raw.get(name, allowed)
        if value != allowed or isinstance(value, bool) != isinstance(allowed, bool):
            raise ModelFolderError(f"{where}: {name} must be {allowed!r}, it is {shown(value)}")


def _check_shape(config: BertConfig, where: str) -> None:
    if config.hidden_size % config.num_attention_heads:
        raise ModelFolderError(
            f"{where}: hidden_size ({config.hidden_size}) must be a multiple of"
            f" num_attention_heads ({config.num_attention_heads})"
        )
    if config.half_wave_length < config.max_position_embeddings:
        raise ModelFolderError(
            f"{where}: cosformer_max_length ({config.half_wave_length}) must be at least"
            f" max_position_embeddings ({config.max_position_embeddings}): beyond it weights would"
            " be negative"
        )

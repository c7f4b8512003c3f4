"""The configurations of flash-linear-attention's models, read from a config.json.

Each class is one `model_type`; `FLAConfig` is what all have. Loads no torch. Everything here raises
ModelFolderError; `where` names the file in the message.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from cottention.engine.errors import ModelFolderError
from cottention.engine.models.config import (
    MAX_KERNEL,
    MAX_LAYERS,
    MAX_WIDTH,
    ModelConfig,
    choice,
    epsilon,
    number,
    require,
    size,
    switch,
    token_ids,
)
from cottention.engine.state.spec import StateTensor, recurrence_tensors


@dataclass(frozen=True, slots=True)
class FLAConfig(ModelConfig):
    """The frame of all: embeddings, layers of a mixer and a gated MLP, and the last norm.

    key_width, value_width: K and V of a head, which follow from the fields of the family.
    conv_size: width of the short convolutions; 0 where there are none.
    has_norm_weight: whether the mixer's output norm has one (`elementwise_affine`).
    """

    frame_fields: ClassVar[tuple[str, ...]] = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_heads",
        "key_width",
        "value_width",
        "intermediate_size",
        "norm_eps",
        "conv_size",
        "has_norm_weight",
        "tie_word_embeddings",
        "max_position_embeddings",
    )
    name: ClassVar[str]

    hidden_size: int
    num_hidden_layers: int
    num_heads: int
    key_width: int
    value_width: int
    intermediate_size: int
    norm_eps: float = 1e-6
    conv_size: int = 0
    has_norm_weight: bool = True
    tie_word_embeddings: bool = False
    max_position_embeddings: int | None = None

    @property
    def num_states(self) -> int:
        """Heads that have a state of their own."""
        return self.num_heads

    @property
    def conv_channels(self) -> int:
        """Channels of all short convolutions of a layer: queries, keys and values."""
        return 2 * self.num_heads * self.key_width + self.num_states * self.value_width

    @property
    def trained_length(self) -> int | None:
        return self.max_position_embeddings

    def state_tensors(self) -> tuple[StateTensor, ...]:
        recurrence = recurrence_tensors(
            layers=self.num_hidden_layers,
            heads=self.num_states,
            value_width=self.value_width,
            key_width=self.key_width,
        )
        if not self.conv_size:
            return recurrence
        shape = self.num_hidden_layers, self.conv_size - 1, self.conv_channels
        return *recurrence, StateTensor("conv", shape)

    def description(self) -> dict[str, str]:
        return {
            "attention": self.name,
            "shape": f"{self.num_hidden_layers} layers of {self.num_states} heads of"
            f" {self.value_width}, key width {self.key_width}",
        }


@dataclass(frozen=True, slots=True)
class GLAConfig(FLAConfig):
    """Gated linear attention (arXiv 2312.06635): a decay per key, from a product of low rank."""

    model_type: ClassVar[str] = "gla"
    name: ClassVar[str] = "gated linear attention"
    arithmetic_fields: ClassVar[tuple[str, ...]] = (
        *FLAConfig.frame_fields,
        "use_output_gate",
        "clamp_min",
    )

    use_output_gate: bool = True
    clamp_min: float | None = None

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str) -> Self:
        require(raw, {"use_gk": (True,), "use_gv": (False,)}, where)
        clamp = None if raw.get("clamp_min") is None else number(raw, "clamp_min", where)
        return cls(
            **_frame(raw, where),
            **_expanded(raw, where, key=0.5, value=1.0),
            **_switches(cls, raw, where),
            conv_size=_conv_size(raw, where, default=False),
            clamp_min=clamp,
        )


@dataclass(frozen=True, slots=True)
class RetNetConfig(FLAConfig):
    """RetNet (arXiv 2307.08621): a constant decay per head, and rotary embedding."""

    model_type: ClassVar[str] = "retnet"
    name: ClassVar[str] = "retention"
    arithmetic_fields: ClassVar[tuple[str, ...]] = (*FLAConfig.frame_fields, "use_output_gate")

    use_output_gate: bool = True

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str) -> Self:
        config = cls(
            **_frame(raw, where),
            **_expanded(raw, where, key=1.0, value=2.0),
            **_switches(cls, raw, where),
        )
        if config.key_width % 2:
            raise ModelFolderError(
                f"{where}: a head's key width ({config.key_width}) must be even, because its halves"
                " are rotated"
            )
        return config


@dataclass(frozen=True, slots=True)
class HGRN2Config(FLAConfig):
    """HGRN2 (arXiv 2404.07904): a decay per key from forget gates, with a lower bound per layer."""

    model_type: ClassVar[str] = "hgrn2"
    name: ClassVar[str] = "gated linear recurrence with state expansion"
    arithmetic_fields: ClassVar[tuple[str, ...]] = (*FLAConfig.frame_fields, "use_lower_bound")

    use_lower_bound: bool = True

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str) -> Self:
        frame = _frame(raw, where)
        width = frame["hidden_size"]
        if raw.get("expand_ratio") is None and raw.get("num_heads") is not None:
            key = width // size(raw, "num_heads", where, most=MAX_WIDTH)
        else:
            key = size(raw, "expand_ratio", where, default=128, most=MAX_WIDTH)
        if key == 0 or width % key:
            raise ModelFolderError(
                f"{where}: hidden_size ({width}) must be a multiple of expand_ratio ({key})"
            )
        return cls(
            **frame | {"num_heads": width // key},
            **_switches(cls, raw, where),
            key_width=key,
            value_width=key,
            conv_size=_conv_size(raw, where, default=False),
        )


@dataclass(frozen=True, slots=True)
class DeltaNetConfig(FLAConfig):
    """DeltaNet (arXiv 2406.06484): what a key held before is taken out."""

    model_type: ClassVar[str] = "delta_net"
    name: ClassVar[str] = "delta rule"
    arithmetic_fields: ClassVar[tuple[str, ...]] = (
        *FLAConfig.frame_fields,
        "use_gate",
        "use_beta",
        "allow_neg_eigval",
        "qk_norm",
        "qk_activation",
    )

    use_gate: bool = False
    use_beta: bool = True
    allow_neg_eigval: bool = False
    qk_norm: str = "l2"
    qk_activation: str = "silu"

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str) -> Self:
        return cls(
            **_frame(raw, where),
            **_expanded(raw, where, key=1.0, value=1.0),
            **_switches(cls, raw, where),
            conv_size=_conv_size(raw, where, default=True),
            qk_norm=choice(raw, "qk_norm", where, ("l2", "sum")),
            qk_activation=choice(raw, "qk_activation", where, ("silu", "relu", "elu", "identity")),
        )


@dataclass(frozen=True, slots=True)
class GatedDeltaNetConfig(FLAConfig):
    """Gated DeltaNet (arXiv 2412.06464): the delta rule on a state that decays.

    num_heads: of queries and keys; num_v_heads, a multiple, of values.
    """

    model_type: ClassVar[str] = "gated_deltanet"
    name: ClassVar[str] = "gated delta rule"
    arithmetic_fields: ClassVar[tuple[str, ...]] = (
        *FLAConfig.frame_fields,
        "num_v_heads",
        "use_gate",
        "allow_neg_eigval",
        "output_gate_activation",
    )

    num_v_heads: int = 0
    use_gate: bool = True
    allow_neg_eigval: bool = False
    output_gate_activation: str = "swish"

    @property
    def num_states(self) -> int:
        return self.num_v_heads

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str) -> Self:
        frame = _frame(raw, where)
        heads = size(raw, "num_heads", where, default=6, most=MAX_WIDTH)
        num_v_heads = size(raw, "num_v_heads", where, default=heads, most=MAX_WIDTH)
        if num_v_heads % heads:
            raise ModelFolderError(
                f"{where}: num_v_heads ({num_v_heads}) must be a multiple of num_heads ({heads})"
            )
        key = size(raw, "head_dim", where, default=256, most=MAX_WIDTH)
        expand_v = number(raw, "expand_v", where, default=2.0)
        gates = ("swish", "silu", "sigmoid")
        return cls(
            **frame | {"num_heads": heads},
            **_switches(cls, raw, where),
            key_width=key,
            value_width=_scaled(key, expand_v, where, "expand_v"),
            conv_size=_conv_size(raw, where, default=True),
            num_v_heads=num_v_heads,
            output_gate_activation=choice(raw, "output_gate_activation", where, gates),
        )


_REQUIRED: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("swish", "silu"),
    "attn": (None,),
    "attnres_block_size": (None,),
    "feature_map": (None,),
}
"""What these fields must be, where they are given.

`attn` names softmax layers among the others, whose cache would grow with the text.
"""

_MLP_MULTIPLE = 256


def _frame(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields that all have."""
    heads = size(raw, "num_heads", where, default=4, most=MAX_WIDTH)
    require(raw, {**_REQUIRED, "num_kv_heads": (None, heads)}, where)
    width = size(raw, "hidden_size", where, most=MAX_WIDTH)
    ratio = number(raw, "hidden_ratio", where, default=4)
    inner = -(-int(width * ratio * 2 / 3) // _MLP_MULTIPLE) * _MLP_MULTIPLE
    length = raw.get("max_position_embeddings")
    return {
        "vocab_size": size(raw, "vocab_size", where),
        "hidden_size": width,
        "num_hidden_layers": size(raw, "num_hidden_layers", where, most=MAX_LAYERS),
        "num_heads": heads,
        "intermediate_size": size(raw, "intermediate_size", where, inner, most=MAX_WIDTH),
        "norm_eps": epsilon(raw, "norm_eps", where, default=1e-6),
        "has_norm_weight": switch(raw, "elementwise_affine", where, default=True),
        "tie_word_embeddings": switch(raw, "tie_word_embeddings", where),
        "max_position_embeddings": None
        if length is None
        else size(raw, "max_position_embeddings", where, least=2),
        "eos_token_ids": token_ids(raw, "eos_token_id", where),
        "torch_dtype": str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
    }


def _switches(config: type[FLAConfig], raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The family's own fields that are true or false, with the defaults of its class."""
    frame = {field.name for field in fields(FLAConfig)}
    own = [field for field in fields(config) if field.type is bool and field.name not in frame]
    return {each.name: switch(raw, each.name, where, default=bool(each.default)) for each in own}


def _expanded(raw: dict[str, Any], where: str, *, key: float, value: float) -> dict[str, Any]:
    """K and V of a head, from `expand_k` and `expand_v` and their defaults."""
    width = size(raw, "hidden_size", where, most=MAX_WIDTH)
    heads = size(raw, "num_heads", where, default=4, most=MAX_WIDTH)
    widths = {}
    for name, expand, default in (("key", "expand_k", key), ("value", "expand_v", value)):
        total = _scaled(width, number(raw, expand, where, default=default), where, expand)
        if total % heads:
            raise ModelFolderError(
                f"{where}: hidden_size · {expand} ({total}) must be a multiple of num_heads"
                f" ({heads})"
            )
        widths[f"{name}_width"] = total // heads
    return widths


def _scaled(width: int, factor: float, where: str, name: str) -> int:
    scaled = int(width * factor)
    if not 1 <= scaled <= MAX_WIDTH:
        raise ModelFolderError(
            f"{where}: {name} ({factor}) times {width} must be from 1 to {MAX_WIDTH}"
        )
    return scaled


def _conv_size(raw: dict[str, Any], where: str, *, default: bool) -> int:
    """Width of the short convolutions, 0 where `use_short_conv` is false."""
    if not switch(raw, "use_short_conv", where, default=default):
        return 0
    return size(raw, "conv_size", where, default=4, least=2, most=MAX_KERNEL)

"""The configuration of an RWKV-7, from a config.json or from the shapes of a .pth file's weights.

Loads no torch. Everything here raises ModelFolderError; `where` names the file in the message.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from cottention.engine.errors import ModelFolderError
from cottention.engine.models.config import (
    MAX_LAYERS,
    MAX_WIDTH,
    ModelConfig,
    epsilon,
    size,
    switch,
    token_ids,
)
from cottention.engine.settings.declaration import shown
from cottention.engine.state.spec import StateTensor, recurrence_tensors

PTH_NORM_EPS = 1e-5
PTH_GROUP_NORM_EPS = 64e-5
"""Of a .pth file, whatever its head size; a folder's is head_dim · norm_eps."""

Shapes = Mapping[str, tuple[int, ...]]
"""Of weights, by name."""


@dataclass(frozen=True, slots=True)
class LowRanks:
    """Ranks of the low-rank products that make decay, a, v's mix and gate."""

    w: int
    a: int
    v: int
    g: int


@dataclass(frozen=True, slots=True)
class RWKV7Config(ModelConfig):
    """Shape of an RWKV-7 (arXiv 2503.14456), under the names that a config.json uses.

    low_ranks: None until the weights are read; only they are sure to have them.
    max_position_embeddings: the length that a folder says it was trained on.
    """

    model_type: ClassVar[str] = "rwkv7"
    arithmetic_fields: ClassVar[tuple[str, ...]] = (
        "vocab_size",
        "hidden_size",
        "head_dim",
        "num_hidden_layers",
        "intermediate_size",
        "norm_eps",
        "group_norm_eps",
        "norm_first",
        "norm_bias",
        "tie_word_embeddings",
        "max_position_embeddings",
    )

    hidden_size: int
    head_dim: int
    num_hidden_layers: int
    intermediate_size: int
    norm_eps: float
    group_norm_eps: float
    norm_first: bool = True
    norm_bias: bool = True
    tie_word_embeddings: bool = False
    max_position_embeddings: int | None = None
    low_ranks: LowRanks | None = None

    @property
    def num_heads(self) -> int:
        """H."""
        return self.hidden_size // self.head_dim

    @property
    def trained_length(self) -> int | None:
        return self.max_position_embeddings

    def state_tensors(self) -> tuple[StateTensor, ...]:
        layers, shift = self.num_hidden_layers, (self.num_hidden_layers, self.hidden_size)
        recurrence = recurrence_tensors(
            layers=layers,
            heads=self.num_heads,
            value_width=self.head_dim,
            key_width=self.head_dim,
        )
        return *recurrence, StateTensor("att_shift", shift), StateTensor("ffn_shift", shift)

    def description(self) -> dict[str, str]:
        return {
            "attention": "delta rule with a decay per channel (arXiv 2503.14456)",
            "shape": f"{self.num_hidden_layers} layers of {self.num_heads} heads of"
            f" {self.head_dim}",
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str) -> Self:
        hidden_size = size(raw, "hidden_size", where, most=MAX_WIDTH)
        _check_options(raw, hidden_size, where)
        heads = size(raw, "num_heads", where, default=max(1, hidden_size // 64), most=MAX_WIDTH)
        default = 64 if raw.get("num_heads") is None else max(1, hidden_size // heads)
        head_dim = size(raw, "head_dim", where, default=default, most=MAX_WIDTH)
        if hidden_size % head_dim:
            raise ModelFolderError(
                f"{where}: hidden_size ({hidden_size}) must be a multiple of head_dim ({head_dim})"
            )
        norm_eps = epsilon(raw, "norm_eps", where, default=1e-5)
        length = raw.get("max_position_embeddings")
        return cls(
            vocab_size=size(raw, "vocab_size", where),
            hidden_size=hidden_size,
            head_dim=head_dim,
            num_hidden_layers=size(raw, "num_hidden_layers", where, most=MAX_LAYERS),
            intermediate_size=_intermediate_size(raw, hidden_size, where),
            norm_eps=norm_eps,
            group_norm_eps=head_dim * norm_eps,
            norm_first=switch(raw, "norm_first", where, default=True),
            norm_bias=switch(raw, "norm_bias", where, default=True),
            tie_word_embeddings=switch(raw, "tie_word_embeddings", where),
            max_position_embeddings=None
            if length is None
            else size(raw, "max_position_embeddings", where, least=2),
            eos_token_ids=token_ids(raw, "eos_token_id", where),
            torch_dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        )

    @classmethod
    def from_shapes(cls, shapes: Shapes, torch_dtype: str, where: str) -> Self:
        """From the weights of a .pth file, all of whose sizes are in their shapes."""
        _check_is_rwkv7(shapes, where)
        vocab_size, hidden_size = _dims(shapes, "emb.weight", 2, where)
        heads, head_dim = _dims(shapes, "blocks.0.att.r_k", 2, where)
        inner, _ = _dims(shapes, "blocks.0.ffn.key.weight", 2, where)
        if heads * head_dim != hidden_size:
            raise ModelFolderError(
                f"{where}: blocks.0.att.r_k is {heads} heads of {head_dim}, and emb.weight has"
                f" {hidden_size} channels"
            )
        blocks = {int(found[1]) for name in shapes if (found := _BLOCK.match(name))}
        if max(blocks) >= MAX_LAYERS:
            raise ModelFolderError(f"{where} names block {max(blocks)}; at most {MAX_LAYERS}")
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            head_dim=head_dim,
            num_hidden_layers=1 + max(blocks),
            intermediate_size=inner,
            norm_eps=PTH_NORM_EPS,
            group_norm_eps=PTH_GROUP_NORM_EPS,
            torch_dtype=torch_dtype,
        )


_BLOCK = re.compile(r"blocks\.(\d{1,9})\.")

_REFUSED = {"attn": None, "hidden_act": "sqrelu"}
"""Options that change the arithmetic, and their only value that is computed here."""


def _check_options(raw: dict[str, Any], hidden_size: int, where: str) -> None:
    for name, allowed in _REFUSED.items():
        if raw.get(name, allowed) != allowed:
            raise ModelFolderError(
                f"{where}: {name} must be {shown(allowed)}, it is {shown(raw[name])}, which is not"
                " supported"
            )
    widths = raw.get("value_dim")
    for width in widths if isinstance(widths, list) else [widths]:
        if width not in (None, hidden_size):
            raise ModelFolderError(
                f"{where}: value_dim must be hidden_size ({hidden_size}) in every layer, it is"
                f" {shown(widths)}, which is not supported"
            )


def _intermediate_size(raw: dict[str, Any], hidden_size: int, where: str) -> int:
    """null: hidden_size · hidden_ratio, rounded up to a multiple of 32."""
    ratio = raw.get("hidden_ratio", 4)
    if not isinstance(ratio, (int, float)) or not 0 < (ratio or 4) <= 64:
        raise ModelFolderError(f"{where}: hidden_ratio must be a number, it is {shown(ratio)}")
    default = -(-int(hidden_size * (ratio or 4)) // 32) * 32
    return size(raw, "intermediate_size", where, default=default, most=MAX_WIDTH)


def _check_is_rwkv7(shapes: Shapes, where: str) -> None:
    """Refuse other models by their names' marks, and other versions of RWKV by name."""
    marks = ("blocks.0.att.r_k", "blocks.0.att.x_r", "blocks.0.att.w1", "emb.weight")
    if any(".s_emb" in name or name.startswith("s_emb") for name in shapes):
        version = "an RWKV with DeepEmbed (s_emb)"
    elif all(name in shapes for name in marks):
        return
    elif any("time_maa" in name for name in shapes):
        version = "an RWKV-6"
    elif any("time_mix_" in name or "time_decay" in name for name in shapes):
        version = "an RWKV-5 or older"
    else:
        raise ModelFolderError(
            f"{where} has no weights of an RWKV-7: missing are"
            f" {', '.join(name for name in marks if name not in shapes)}"
        )
    raise ModelFolderError(
        f"{where} is {version}, which is not supported; of single files only RWKV-7 is"
    )


def _dims(shapes: Shapes, name: str, num: int, where: str) -> tuple[int, ...]:
    """The shape of a weight that has `num` dimensions."""
    shape = shapes.get(name)
    if shape is None or len(shape) != num or not all(0 < each <= 2**31 - 1 for each in shape):
        found = "missing" if shape is None else f"of shape {list(shape)}"
        raise ModelFolderError(f"{where}: {name} must have {num} dimensions, it is {found}")
    return shape

"""The configurations of Mamba and Mamba-2, read from a config.json.

Loads no torch. Everything here raises ModelFolderError; `where` names the file in the message.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from cottention.engine.errors import ModelFolderError
from cottention.engine.models.config import (
    MAX_KERNEL,
    MAX_LAYERS,
    MAX_WIDTH,
    ModelConfig,
    epsilon,
    require,
    size,
    switch,
    token_ids,
)
from cottention.engine.settings.declaration import shown
from cottention.engine.state.spec import StateTensor, recurrence_tensors

ORIGINAL_FORMAT = (
    "the Mamba project's own format, which is not supported: convert the model with transformers'"
    " models/mamba2/convert_mamba2_ssm_checkpoint_to_pytorch.py (Mamba-2) or"
    " models/mamba/convert_mamba_ssm_checkpoint_to_pytorch.py (Mamba), and give that folder"
)
"""Its config.json has no model_type, and its embeddings another name."""


def is_original(raw: Mapping[str, object]) -> bool:
    """Whether a config.json is of the Mamba project's own format."""
    return "model_type" not in raw and "d_model" in raw and "n_layer" in raw


@dataclass(frozen=True, slots=True)
class MambaConfig(ModelConfig):
    """Mamba (arXiv 2312.00752): one channel is a head of one value, with its own decays."""

    model_type: ClassVar[str] = "mamba"
    arithmetic_fields: ClassVar[tuple[str, ...]] = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "state_size",
        "time_step_rank",
        "conv_kernel",
        "use_conv_bias",
        "use_bias",
        "layer_norm_epsilon",
        "tie_word_embeddings",
    )

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    state_size: int
    time_step_rank: int
    conv_kernel: int = 4
    use_conv_bias: bool = True
    use_bias: bool = False
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str) -> Self:
        require(raw, _REQUIRED, where)
        hidden_size = size(raw, "hidden_size", where, most=MAX_WIDTH)
        inner = size(raw, "expand", where, default=2, most=64) * hidden_size
        if raw.get("time_step_rank") == "auto":
            raw = raw | {"time_step_rank": None}
        rank = size(raw, "time_step_rank", where, default=-(-hidden_size // 16), most=MAX_WIDTH)
        return cls(
            vocab_size=size(raw, "vocab_size", where),
            hidden_size=hidden_size,
            num_hidden_layers=size(raw, "num_hidden_layers", where, most=MAX_LAYERS),
            intermediate_size=size(raw, "intermediate_size", where, inner, most=MAX_WIDTH),
            state_size=size(raw, "state_size", where, default=16, most=MAX_WIDTH),
            time_step_rank=rank,
            **_common(raw, where),
            tie_word_embeddings=switch(raw, "tie_word_embeddings", where, default=True),
        )

    @property
    def trained_length(self) -> None:
        """Its files do not say it."""

    def state_tensors(self) -> tuple[StateTensor, ...]:
        recurrence = recurrence_tensors(
            layers=self.num_hidden_layers,
            heads=self.intermediate_size,
            value_width=1,
            key_width=self.state_size,
        )
        return *recurrence, _tails(self, self.intermediate_size)

    def description(self) -> dict[str, str]:
        return {
            "attention": "selective state space",
            "shape": f"{self.num_hidden_layers} layers of {self.intermediate_size} channels,"
            f" state size {self.state_size}",
        }


@dataclass(frozen=True, slots=True)
class Mamba2Config(ModelConfig):
    """Mamba-2 (arXiv 2405.21060): heads with one decay each, keys and queries shared by groups."""

    model_type: ClassVar[str] = "mamba2"
    arithmetic_fields: ClassVar[tuple[str, ...]] = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_heads",
        "head_dim",
        "state_size",
        "n_groups",
        "conv_kernel",
        "use_conv_bias",
        "use_bias",
        "layer_norm_epsilon",
        "time_step_limit",
        "tie_word_embeddings",
    )

    hidden_size: int
    num_hidden_layers: int
    num_heads: int
    head_dim: int
    state_size: int
    n_groups: int
    time_step_limit: tuple[float, float]
    conv_kernel: int = 4
    use_conv_bias: bool = True
    use_bias: bool = False
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str) -> Self:
        require(raw, {**_REQUIRED, **_REQUIRED_OF_MAMBA_2}, where)
        for here, elsewhere in _OTHER_SPELLINGS.items():
            if elsewhere in raw and raw.get(here) is None:
                raw = raw | {here: raw[elsewhere]}
        sizes: dict[str, Any] = {n: size(raw, n, where, most=most) for n, most in _SIZES.items()}
        config = cls(
            **sizes,
            time_step_limit=_time_step_limit(raw.get("time_step_limit"), where),
            **_common(raw, where),
            tie_word_embeddings=switch(raw, "tie_word_embeddings", where),
        )
        expand = size(raw, "expand", where, default=2, most=64)
        if config.intermediate_size != expand * config.hidden_size:
            raise ModelFolderError(
                f"{where}: num_heads · head_dim ({config.intermediate_size}) must be expand ·"
                f" hidden_size ({expand * config.hidden_size})"
            )
        if config.num_heads % config.n_groups:
            raise ModelFolderError(
                f"{where}: num_heads ({config.num_heads}) must be a multiple of n_groups"
                f" ({config.n_groups})"
            )
        return config

    @property
    def intermediate_size(self) -> int:
        """Channels of all heads, I."""
        return self.num_heads * self.head_dim

    @property
    def convolved_size(self) -> int:
        """Channels of the short convolution: values, keys and queries."""
        return self.intermediate_size + 2 * self.n_groups * self.state_size

    @property
    def trained_length(self) -> None:
        """Its files do not say it."""

    def state_tensors(self) -> tuple[StateTensor, ...]:
        recurrence = recurrence_tensors(
            layers=self.num_hidden_layers,
            heads=self.num_heads,
            value_width=self.head_dim,
            key_width=self.state_size,
        )
        return *recurrence, _tails(self, self.convolved_size)

    def description(self) -> dict[str, str]:
        return {
            "attention": "state space duality",
            "shape": f"{self.num_hidden_layers} layers of {self.num_heads} heads of"
            f" {self.head_dim}, state size {self.state_size}",
        }


_SIZES = {
    "vocab_size": 2**31 - 1,
    "hidden_size": MAX_WIDTH,
    "num_hidden_layers": MAX_LAYERS,
    "num_heads": MAX_WIDTH,
    "head_dim": MAX_WIDTH,
    "state_size": MAX_WIDTH,
    "n_groups": MAX_WIDTH,
}

_REQUIRED: Mapping[str, tuple[object, ...]] = {"hidden_act": ("silu", "swish")}
_REQUIRED_OF_MAMBA_2: Mapping[str, tuple[object, ...]] = {
    "rmsnorm": (True,),
    "norm_before_gate": (False,),
    "D_has_hdim": (False,),
}
"""What these fields must be, where they are given: anything else is another arithmetic."""

_OTHER_SPELLINGS = {"layer_norm_epsilon": "norm_eps", "time_step_limit": "dt_limit"}
"""Names of transformers, and of flash-linear-attention."""


def _common(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields that both have."""
    return {
        "conv_kernel": size(raw, "conv_kernel", where, default=4, least=2, most=MAX_KERNEL),
        "use_conv_bias": switch(raw, "use_conv_bias", where, default=True),
        "use_bias": switch(raw, "use_bias", where),
        "layer_norm_epsilon": epsilon(raw, "layer_norm_epsilon", where, default=1e-5),
        "eos_token_ids": token_ids(raw, "eos_token_id", where),
        "torch_dtype": str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
    }


def _tails(config: MambaConfig | Mamba2Config, channels: int) -> StateTensor:
    """Inputs of the short convolution of the last tokens, the oldest first: [L, W − 1, C]."""
    return StateTensor("conv", (config.num_hidden_layers, config.conv_kernel - 1, channels))


def _time_step_limit(value: object, where: str) -> tuple[float, float]:
    """Two numbers; infinity as JSON has it in practice, or as transformers 5 writes it."""
    limits = (0.0, math.inf) if value is None else value
    if isinstance(limits, (list, tuple)) and len(limits) == 2:
        numbers = [_number(each) for each in limits]
        low, high = (math.nan if each is None else each for each in numbers)
        if 0 <= low < high:
            return low, high
    raise ModelFolderError(
        f"{where}: time_step_limit must be two numbers from 0, the smaller first, such as"
        f' [0.0, {{"__float__": "Infinity"}}]; it is {shown(value)}'
    )


def _number(value: object) -> float | None:
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        return math.inf if value["__float__"] == "Infinity" else None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else None  # type: ignore[arg-type]

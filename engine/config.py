"""What is fixed before the first token: the model's shape, a state's bytes, the engine's limits.

Owns `ModelConfig` (read from a model folder), `StateSpec` (exact bytes of one session's state) and
`EngineConfig` (the one declaration from which flags, variables, defaults and help are made).
Knows no torch modules, and loads none before a model is named: `--help` stays quick.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from engine import fields
from engine.errors import ConfigurationError, ModelFolderError
from engine.options import check_options, option

STATE_BYTES_PER_ELEMENT = 4
"""State is float32: facts of the papers' precision table."""

DEFAULT_SLOTS = 64

DType = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a Cottention GPT-J, under the names that its config.json uses."""

    vocab_size: int
    n_embd: int
    n_layer: int
    n_head: int
    n_positions: int
    rotary_dim: int
    n_inner: int
    layer_norm_epsilon: float = 1e-5
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    attention_type: str = "cottention"
    torch_dtype: str = "float32"

    @property
    def head_dim(self) -> int:
        """Channels per head, D."""
        return self.n_embd // self.n_head

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read and check `folder`/config.json. Raises ModelFolderError."""
        path = folder / "config.json"
        return cls.from_dict(fields.read(path), str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str) -> Self:
        """From a config.json's object; `where` names it in messages. Raises ModelFolderError."""
        _check_kind(raw, where)
        sizes = {name: fields.size(raw, name, where) for name in _SIZES}
        config = cls(
            **sizes,
            rotary_dim=fields.size(raw, "rotary_dim", where, default=_GPTJ_ROTARY_DIM),
            n_inner=fields.size(raw, "n_inner", where, default=4 * sizes["n_embd"]),
            layer_norm_epsilon=fields.epsilon(raw, "layer_norm_epsilon", where, default=1e-5),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=fields.token_ids(raw, "eos_token_id", where),
            attention_type=raw.get("attention_type", "cottention"),
            torch_dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        )
        _check_widths(config, where)
        return config


_GPTJ_ROTARY_DIM = 64
"""What transformers takes where a GPT-J's config.json does not say."""

_SIZES = ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions")


def _check_kind(raw: dict[str, Any], where: str) -> None:
    """The switches of config.json that this model has in one position only."""
    kind = raw.get("model_type")
    if kind != "gptj":
        raise ModelFolderError(
            f"{where}: model_type is {kind!r}; a causal Cottention model has model_type 'gptj'"
        )
    from engine.feature_maps import FEATURE_MAPS

    attention = raw.get("attention_type", "cottention")
    if not isinstance(attention, str) or attention not in FEATURE_MAPS:
        known = ", ".join(sorted(FEATURE_MAPS))
        raise ModelFolderError(f"{where}: attention_type {attention!r} is not one of: {known}")
    for name, allowed in (("activation_function", "gelu_new"), ("tie_word_embeddings", False)):
        if raw.get(name, allowed) != allowed:
            raise ModelFolderError(f"{where}: {name} must be {allowed!r}, it is {raw[name]!r}")


def _check_widths(config: ModelConfig, where: str) -> None:
    if config.n_embd % config.n_head:
        raise ModelFolderError(
            f"{where}: n_embd ({config.n_embd}) must be a multiple of n_head ({config.n_head})"
        )
    if config.rotary_dim % 2 or config.rotary_dim > config.head_dim:
        raise ModelFolderError(
            f"{where}: rotary_dim ({config.rotary_dim}) must be even and at most the head's width"
            f" ({config.head_dim})"
        )


@dataclass(frozen=True, slots=True)
class StateSpec:
    """Exact shape and bytes of one session's state in the pool; nothing in it depends on length."""

    layers: int
    heads: int
    value_width: int
    key_width: int
    has_denominator: bool

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """The state that a model of this shape keeps."""
        from engine.feature_maps import FEATURE_MAPS

        feature_map = FEATURE_MAPS[config.attention_type]
        return cls(
            layers=config.n_layer,
            heads=config.n_head,
            value_width=config.head_dim,
            key_width=feature_map.key_width(config.head_dim),
            has_denominator=feature_map.has_denominator,
        )

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """[L, H, V, K] of one slot."""
        return self.layers, self.heads, self.value_width, self.key_width

    @property
    def denominator_shape(self) -> tuple[int, int, int]:
        """[L, H, K] of one slot."""
        return self.layers, self.heads, self.key_width

    def itemised_bytes(self) -> dict[str, int]:
        """Bytes of one slot, by what they hold."""
        denominator = math.prod(self.denominator_shape) if self.has_denominator else 0
        return {
            "state": math.prod(self.state_shape) * STATE_BYTES_PER_ELEMENT,
            "denominator": denominator * STATE_BYTES_PER_ELEMENT,
        }

    @property
    def bytes_per_slot(self) -> int:
        """All bytes of one slot."""
        return sum(self.itemised_bytes().values())


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The engine's settings: each is a flag `--like-this` and a variable `COTTENTION_LIKE_THIS`."""

    device: Device = option("auto", "where the model runs; auto takes CUDA if there is one")
    dtype: DType = option(
        "auto", "type of the weights; auto is float32 on a CPU, the checkpoint's own on CUDA"
    )
    max_slots: int | None = option(
        None, "states in the pool, which is how many sequences run at once (default 64)", minimum=1
    )
    state_memory: int | None = option(
        None,
        "memory for the pool, instead of --max-slots; 512M and 2G are understood",
        minimum=1,
        unit="bytes",
    )
    max_batch_tokens: int = option(
        512, "most tokens that one step computes, over all sequences", minimum=2, unit="tokens"
    )
    max_tokens_limit: int = option(
        1_000_000, "most tokens that one request may ask for", minimum=1, unit="tokens"
    )
    prefix_cache_bytes: int = option(
        256 * 1024**2, "memory for states after prompts; 0 keeps none", minimum=0, unit="bytes"
    )
    threads: int | None = option(None, "CPU threads (default: torch's own choice)", minimum=1)

    def __post_init__(self) -> None:
        check_options(self)
        if self.max_slots is not None and self.state_memory is not None:
            raise ConfigurationError("give --max-slots or --state-memory, not both")

    def num_slots(self, spec: StateSpec) -> int:
        """Slots in the pool. Raises ConfigurationError where the memory holds none."""
        if self.state_memory is None:
            return self.max_slots or DEFAULT_SLOTS
        slots = self.state_memory // spec.bytes_per_slot
        if slots < 1:
            raise ConfigurationError(
                f"--state-memory {self.state_memory} is less than the {spec.bytes_per_slot} bytes"
                " of one state of this model"
            )
        return slots

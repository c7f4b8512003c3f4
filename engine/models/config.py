"""The model's shape, as its folder's config.json tells it. Knows no torch modules.

A config.json and its single fields, checked. `model_config.py` says which a model has.

Everything here raises ModelFolderError; `where` is the file's name for the message.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cottention.engine.errors import ModelFolderError
from cottention.engine.models.attention_kinds import ATTENTION_KINDS


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a GPT-J with attention of some kind, under the names that its config.json uses."""

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
    attention_bias: bool = False
    cosformer_max_length: int | None = None

    @property
    def head_dim(self) -> int:
        """Channels per head, D."""
        return self.n_embd // self.n_head

    @property
    def reachable_ends(self) -> tuple[int, ...]:
        """Ends of text that the model can draw: a config.json may name ids that it has not."""
        return tuple(each for each in self.eos_token_ids if 0 <= each < self.vocab_size)

    @property
    def max_exact_length(self) -> int | None:
        """cosFormer's M: further apart weights would turn negative. None: as long as one likes."""
        if self.attention_type != "cosformer":
            return None
        return self.cosformer_max_length or self.n_positions

    @property
    def window(self) -> int:
        """Tokens up to which the model is good: the trained length, and no more than M."""
        return min(self.n_positions, self.max_exact_length or self.n_positions)

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read and check `folder`/config.json. Raises ModelFolderError."""
        path = folder / "config.json"
        return cls.from_dict(read(path), str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str) -> Self:
        """From a config.json's object; `where` names it in messages. Raises ModelFolderError."""
        _check_kind(raw, where)
        sizes = {name: size(raw, name, where) for name in _SIZES}
        config = cls(
            **sizes,
            rotary_dim=size(raw, "rotary_dim", where, default=_GPTJ_ROTARY_DIM, least=0),
            n_inner=size(raw, "n_inner", where, default=4 * sizes["n_embd"]),
            layer_norm_epsilon=epsilon(raw, "layer_norm_epsilon", where, default=1e-5),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=token_ids(raw, "eos_token_id", where),
            attention_type=raw.get("attention_type", "cottention"),
            torch_dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
            attention_bias=switch(raw, "attention_bias", where),
            cosformer_max_length=_max_length(raw, where),
        )
        _check_shape(config, where)
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
    attention = raw.get("attention_type", "cottention")
    if not isinstance(attention, str) or attention not in ATTENTION_KINDS:
        known = ", ".join(sorted(ATTENTION_KINDS))
        raise ModelFolderError(f"{where}: attention_type {attention!r} is not one of: {known}")
    for name, allowed in (("activation_function", "gelu_new"), ("tie_word_embeddings", False)):
        if raw.get(name, allowed) != allowed:
            raise ModelFolderError(f"{where}: {name} must be {allowed!r}, it is {raw[name]!r}")


def _max_length(raw: dict[str, Any], where: str) -> int | None:
    if raw.get("attention_type") != "cosformer":
        return None
    return size(raw, "cosformer_max_length", where, default=raw["n_positions"])


def _check_shape(config: ModelConfig, where: str) -> None:
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


def read(path: Path) -> dict[str, Any]:
    """The object in a file of a model folder."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFolderError(
            f"{path.parent} has no {path.name}: give a Hugging Face model folder"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ModelFolderError(f"{path} must hold a JSON object")
    return raw


def size(
    raw: dict[str, Any], name: str, where: str, default: int | None = None, least: int = 1
) -> int:
    """A whole number from `least`; the default where it is null or absent."""
    value = raw.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ModelFolderError(
            f"{where}: {name} must be a whole number from {least}, it is {value!r}"
        )
    return value


def switch(raw: dict[str, Any], name: str, where: str) -> bool:
    """true or false; false where it is absent."""
    value = raw.get(name, False)
    if not isinstance(value, bool):
        raise ModelFolderError(f"{where}: {name} must be true or false, it is {value!r}")
    return value


def epsilon(raw: dict[str, Any], name: str, where: str, default: float) -> float:
    """A number between 0 and 1, which are excluded."""
    value = raw.get(name, default)
    if not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ModelFolderError(f"{where}: {name} must be a number between 0 and 1, it is {value!r}")
    return float(value)


def token_ids(raw: dict[str, Any], name: str, where: str) -> tuple[int, ...]:
    """A whole number, a list of them, or null."""
    value = raw.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(each) is int for each in ids):
        raise ModelFolderError(
            f"{where}: {name} must be a whole number, a list of them or null, it is {value!r}"
        )
    return tuple(ids)

"""What every model's configuration has, and how single fields of a config.json are read.

A family's own configuration derives from `ModelConfig`. Everything here raises ModelFolderError;
`where` names the file in the message. Loads no torch.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Self

from cottention.engine.errors import ModelFolderError
from cottention.engine.settings.declaration import shown
from cottention.engine.state.spec import StateSpec, StateTensor


@dataclass(frozen=True, slots=True)
class ModelConfig(ABC):
    """A model's configuration, whatever its family.

    model_type: the family, as a config.json names it.
    arithmetic_fields: fields on which a state's numbers, or their meaning, depend.
    optional_arithmetic_fields: more of them, each with the value that a model had before the field
    came to be; with this value it is not part of the fingerprint, so that older sessions remain.
    is_encoder: whether it reads a text as a whole, and neither generates text nor keeps a state.
    torch_dtype: type in which the weights are stored.
    """

    model_type: ClassVar[str]
    is_encoder: ClassVar[bool] = False
    arithmetic_fields: ClassVar[tuple[str, ...]]
    optional_arithmetic_fields: ClassVar[Mapping[str, object]] = {}

    vocab_size: int
    _: KW_ONLY
    eos_token_ids: tuple[int, ...] = ()
    torch_dtype: str = "float32"

    @classmethod
    @abstractmethod
    def from_dict(cls, raw: dict[str, Any], where: str) -> Self:
        """From a config.json's object. Raises ModelFolderError."""

    @property
    @abstractmethod
    def trained_length(self) -> int | None:
        """Tokens that the model was trained to follow; None where that is not known."""

    @abstractmethod
    def state_tensors(self) -> tuple[StateTensor, ...]:
        """What one sequence's state consists of."""

    @abstractmethod
    def description(self) -> dict[str, str]:
        """Facts of the architecture for people, such as attention and shape, by name."""

    @property
    def max_exact_length(self) -> int | None:
        """Tokens after which the recurrence means nothing, if there is such a limit."""
        return None

    @property
    def window(self) -> int | None:
        """Tokens up to which the model is good: no more than trained for, nor than the limit."""
        if self.trained_length is None:
            return None
        return min(self.trained_length, self.max_exact_length or self.trained_length)

    def longest_prompt_part(self, max_tokens: int) -> int:
        """Ids of one prompt in a step of `max_tokens`, at most."""
        return min(max_tokens, self.max_exact_length or max_tokens)

    @property
    def reachable_ends(self) -> tuple[int, ...]:
        """Ends of text that can be sampled: a config.json may name ids that the model lacks."""
        return tuple(each for each in self.eos_token_ids if 0 <= each < self.vocab_size)

    def check_served(self, where: str) -> None:  # noqa: B027 - most families serve all they read
        """Raise ModelFolderError for a model that can be trained and not served."""

    def state_spec(self, *, has_spare: bool = False) -> StateSpec:
        """Shape and bytes of the state; with a spare, a slot has room for two."""
        return StateSpec(self.state_tensors(), has_spare)

    def arithmetic(self) -> str:
        """The fields on which a state's numbers depend, as `name=value`, for its fingerprint."""
        names = list(self.arithmetic_fields)
        names += [
            name
            for name, earlier in self.optional_arithmetic_fields.items()
            if getattr(self, name) != earlier
        ]
        values = [f"{name}={getattr(self, name)}" for name in names]
        return " ".join([f"model_type={self.model_type}", *values])


MAX_SIZE = 2**31 - 1
MAX_WIDTH = 2**20
MAX_LAYERS = 4096
MAX_KERNEL = 64
"""Largest sizes that the recurrent families read: of a width, of layers, of a convolution."""


def size(
    raw: dict[str, Any],
    name: str,
    where: str,
    default: int | None = None,
    least: int = 1,
    most: int = MAX_SIZE,
) -> int:
    """A whole number from `least` to `most`; the default where it is null or absent."""
    value = raw.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ModelFolderError(
            f"{where}: {name} must be a whole number from {least}, it is {shown(value)}"
        )
    if value > most:
        raise ModelFolderError(f"{where}: {name} must be at most {most}, it is {shown(value)}")
    return value


def switch(raw: dict[str, Any], name: str, where: str, *, default: bool = False) -> bool:
    """true or false; the default where it is absent."""
    value = raw.get(name, default)
    if not isinstance(value, bool):
        raise ModelFolderError(f"{where}: {name} must be true or false, it is {shown(value)}")
    return value


def epsilon(raw: dict[str, Any], name: str, where: str, default: float) -> float:
    """A number between 0 and 1, which are excluded."""
    value = raw.get(name, default)
    if not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ModelFolderError(
            f"{where}: {name} must be a number between 0 and 1, it is {shown(value)}"
        )
    return float(value)


def number(raw: dict[str, Any], name: str, where: str, default: float | None = None) -> float:
    """A finite number; the default where it is null or absent."""
    value = raw.get(name)
    value = default if value is None else value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):  # type: ignore[arg-type]
        raise ModelFolderError(f"{where}: {name} must be a finite number, it is {shown(value)}")
    return float(value)  # type: ignore[arg-type]


def choice(raw: dict[str, Any], name: str, where: str, allowed: tuple[str, ...]) -> str:
    """One of `allowed`, whose first is the default."""
    value = raw.get(name, allowed[0])
    require({name: value}, {name: allowed}, where)
    return str(value)


def require(raw: dict[str, Any], allowed: Mapping[str, tuple[object, ...]], where: str) -> None:
    """Refuse fields that are given and have none of the values that are implemented."""
    for name, values in allowed.items():
        if name in raw and not any(_is_same(raw[name], value) for value in values):
            raise ModelFolderError(
                f"{where}: {name} must be {' or '.join(map(shown, values))}, it is"
                f" {shown(raw[name])}, which is not supported"
            )


def _is_same(value: object, other: object) -> bool:
    """Equal, and not merely as 1 and true are."""
    return type(value) is type(other) and value == other


def token_ids(raw: dict[str, Any], name: str, where: str) -> tuple[int, ...]:
    """A whole number, a list of them, or null."""
    value = raw.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(each) is int for each in ids):
        raise ModelFolderError(
            f"{where}: {name} must be a whole number, a list of them or null, it is {shown(value)}"
        )
    return tuple(ids)

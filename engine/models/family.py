"""What a model family consists of: its configuration, its default context policy, its torch code.

`registry.py` lists the families. Nothing here loads torch: `ModelFamily.implementation` imports a
family's torch modules when a model is loaded.

Letters: N tokens, R rows, C channels.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

from cottention.engine.models.config import ModelConfig
from cottention.engine.state.context_window import ContextPolicy

if TYPE_CHECKING:  # a configuration is read, and its state's size known, without torch
    import torch
    from torch import Tensor

    from cottention.engine.models.encoder import ServedEncoder
    from cottention.engine.models.recurrence import Recurrence

ConfigT = TypeVar("ConfigT", bound=ModelConfig)
ModelT = TypeVar("ModelT")


class ServedModel(Protocol):
    """A model arranged for inference. Its state is in the pool, never in the model."""

    def hidden(self, ids: "Tensor", positions: "Tensor", recurrence: "Recurrence") -> "Tensor":
        """ids and positions int64 [N] → hidden states [N, C]; the batch's rows are updated."""
        ...

    def logits(self, hidden: "Tensor") -> "Tensor":
        """Hidden states [R, C] → logits float32 [R, vocab_size]."""
        ...


@runtime_checkable
class EmbeddingModel(ServedModel, Protocol):
    """A served model whose last hidden states can be used as embeddings."""

    def last_hidden(self, hidden: "Tensor") -> "Tensor":
        """What `hidden` returned, [R, C] → the states that the head of the logits reads, [R, C]."""
        ...


@runtime_checkable
class DelayingModel(ServedModel, Protocol):
    """A served model that may delay what its steps add to states (`DelayedUpdates`)."""

    @property
    def delays_updates(self) -> bool:
        """Whether it does on its device, where the pool has room for them."""
        ...


def as_published(weights: "dict[str, Tensor]", _config: object) -> "dict[str, Tensor]":
    """The `renamed` of a family whose weights have one set of names."""
    return weights


def as_configured(_weights: "Mapping[str, Tensor]", config: ConfigT) -> ConfigT:
    """The `completed` of a family whose configuration says all sizes."""
    return config


def has_no_constants(_name: str, _shape: tuple[int, ...]) -> bool:
    """The `is_constant` of a family whose training code stores nothing but weights."""
    return False


def as_they_are(weights: "dict[str, Tensor]", _model: object) -> "dict[str, Tensor]":
    """The `fit` of a family whose folders all have the same weights."""
    return weights


@dataclass(frozen=True, slots=True)
class ModelImplementation(Generic[ConfigT, ModelT]):
    """The part of a family that needs torch.

    build: the model as an `nn.Module` whose state dict has the names and shapes of the published
    weights; it is called with torch's default device set to "meta".
    weight_dtype: (name of a weight, dtype of the model) → dtype that it is kept in.
    weights_hint: (names in the files, config) → what may be wrong where they are not the model's,
    to follow the list of faults in the message, or "".
    serve: (model with its weights, device) → the model arranged for inference, a ServedEncoder if
    the configuration is an encoder's. It may take the model apart.
    is_constant: (name, shape of a tensor that the model lacks) → whether it is a constant that
    training code has stored beside the weights, to be left out.
    renamed: (weights under the names in the files, config) → weights under the model's names, for a
    family that is published under several.
    completed: (weights under the names in the files, config) → the configuration with sizes that
    only the weights have.
    fit: (weights of the files, model without weights) → weights under the model's own names. It may
    remove from the model what a folder does without, and raises ModelFolderError.
    """

    build: Callable[[ConfigT], ModelT]
    weight_dtype: "Callable[[str, torch.dtype], torch.dtype]"
    weights_hint: Callable[[Iterable[str], ConfigT], str]
    serve: "Callable[[ModelT, str], ServedModel | ServedEncoder]"
    is_constant: Callable[[str, tuple[int, ...]], bool] = has_no_constants
    renamed: "Callable[[dict[str, Tensor], ConfigT], dict[str, Tensor]]" = as_published
    completed: "Callable[[Mapping[str, Tensor], ConfigT], ConfigT]" = as_configured
    fit: "Callable[[dict[str, Tensor], ModelT], dict[str, Tensor]]" = as_they_are


@dataclass(frozen=True, slots=True)
class ModelFamily(Generic[ConfigT, ModelT]):
    """One family of models.

    config: reads a config.json, and knows the state and the arithmetic that follow from it.
    context_policy: the default for models of this family.
    implementation: imports the family's torch modules.
    config_of_file: the configuration of a single file of weights; None: there are only folders.
    """

    config: type[ConfigT]
    context_policy: ContextPolicy
    implementation: Callable[[], ModelImplementation[ConfigT, ModelT]]
    config_of_file: Callable[[Path], ConfigT] | None = None

    @property
    def model_type(self) -> str:
        """The name that a config.json gives the family."""
        return self.config.model_type


AnyFamily = ModelFamily[Any, Any]
"""A family whose model and configuration are not known to the type checker."""

"""Weights into a model's modules.

Checks that the files hold exactly the model's keys and shapes, but for the names that wrappers of
training code give and the constants that it stores.
"""

import logging
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cottention.engine.errors import ModelFolderError
from cottention.engine.models.config import ModelConfig
from cottention.engine.models.family import ModelImplementation
from cottention.engine.models.registry import family_of
from cottention.engine.models.weight_files import read_weights

_log = logging.getLogger(__name__)

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch's wrappers (DataParallel, compile, FSDP, checkpoint) add to the names of weights."""


def load_model(folder: Path, config: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """The model of `folder` on the CPU, with weights in `dtype` where its family has no other.

    Raises ModelFolderError.
    """
    implementation = family_of(config).implementation()
    weights = read_weights(folder)
    config = implementation.completed(weights, config)
    with torch.device("meta"), _WithoutFilling():
        model: nn.Module = implementation.build(config)
    weights = without_wrappers(weights, model.state_dict().keys(), folder)
    weights = implementation.fit(implementation.renamed(weights, config), model)
    weights = _without_constants(weights, model, implementation, folder)
    faults = weight_faults(weights, model)
    if faults:
        hint = implementation.weights_hint(weights, config)
        whose = "its config.json" if folder.is_dir() else f"a model of type {config.model_type}"
        raise ModelFolderError(
            f"the weights in {folder} are not those of {whose}: {'; '.join(faults)}{hint}"
        )
    for name, weight in weights.items():
        weights[name] = weight.to(implementation.weight_dtype(name, dtype))
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


class _WithoutFilling(TorchFunctionMode):
    """Leaves out the random values that modules begin with.

    A tensor of the meta device has no values, but torch fills it by a form of its own that loads
    its compiler: half of the time that opening the shipped model took.
    """

    def __torch_function__(
        self, func: Any, _types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def without_wrappers(
    weights: dict[str, Tensor], expected: Collection[str], folder: Path
) -> dict[str, Tensor]:
    """The weights under the names that they have without `WRAPPERS`, at any depth.

    Names that are `expected` stay. Raises ModelFolderError where two become one.
    """
    renamed: dict[str, Tensor] = {}
    removed: dict[str, None] = {}
    for name, weight in weights.items():
        parts = name.split(".")
        kept = [part for part in parts if part not in WRAPPERS]
        if name in expected or len(kept) == len(parts):
            kept = parts
        removed.update((part, None) for part in parts if part not in kept)
        new = ".".join(kept)
        if new in renamed:
            raise ModelFolderError(
                f"the weights in {folder} have {new} twice, with and without a wrapper's name"
            )
        renamed[new] = weight
    if removed:
        _log.info(
            "%s: names of weights are read without %s",
            folder,
            ", ".join(f"{part}." for part in removed),
        )
    return renamed


def _without_constants(
    weights: dict[str, Tensor],
    model: nn.Module,
    implementation: ModelImplementation[Any, Any],
    folder: Path,
) -> dict[str, Tensor]:
    """The weights without the constants that the family's training code stores beside them."""
    expected = model.state_dict().keys()
    constants = [
        name
        for name, weight in weights.items()
        if name not in expected and implementation.is_constant(name, tuple(weight.shape))
    ]
    if constants:
        _log.info(
            "%s: %d constants of training code among the weights are left out, such as %s",
            folder,
            len(constants),
            constants[0],
        )
    return {name: weight for name, weight in weights.items() if name not in constants}


def weight_faults(weights: dict[str, Tensor], model: nn.Module) -> list[str]:
    """How keys and shapes differ from those of `model`; empty where they are the same."""
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    return [
        *_listed("missing", expected.keys() - weights.keys()),
        *_listed("unexpected", weights.keys() - expected.keys()),
        *_listed("of another shape", _misshapen(weights, expected)),
        *_listed("not of floating point", _of_another_kind(weights, expected)),
    ]


def _misshapen(weights: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> Iterator[str]:
    for name in expected.keys() & weights.keys():
        found = tuple(weights[name].shape)
        if found != expected[name]:
            yield f"{name} {list(found)} instead of {list(expected[name])}"


def _of_another_kind(weights: dict[str, Tensor], expected: Collection[str]) -> Iterator[str]:
    """Weights whose conversion would lose what they mean: quantized, counted or complex ones."""
    for name in weights.keys() & expected:
        if not weights[name].is_floating_point():
            yield f"{name} {str(weights[name].dtype).removeprefix('torch.')}"


def _listed(what: str, names: Iterable[str], most: int = 8) -> Iterator[str]:
    """One phrase that names up to `most` of the keys, or nothing if there are none."""
    found = sorted(names)
    if found:
        more = f" and {len(found) - most} more" if len(found) > most else ""
        yield f"{what}: {', '.join(found[:most])}{more}"

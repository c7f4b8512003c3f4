"""Weights from the files of a Hugging Face folder into a model's modules.

Reads `model.safetensors`, `pytorch_model.bin` and sharded indices of either, and checks that they
hold exactly the model's keys and shapes, but for the names that wrappers of training code give and
the constants that it stores. Nothing that a file brings is executed: a `.bin` is read with
`weights_only=True`, other pickles are never opened.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cottention.engine.errors import ModelFolderError
from cottention.engine.models.config import ModelConfig
from cottention.engine.models.family import ModelImplementation
from cottention.engine.models.registry import family_of
from cottention.engine.text.files import read_json

_log = logging.getLogger(__name__)

Reader = Callable[[Path], dict[str, Tensor]]

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch's wrappers (DataParallel, compile, FSDP, checkpoint) add to the names of weights."""


def load_model(folder: Path, config: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """The model of `folder` on the CPU, with weights in `dtype` where its family has no other.

    Raises ModelFolderError.
    """
    implementation = family_of(config).implementation()
    with torch.device("meta"):
        model: nn.Module = implementation.build(config)
    weights = without_wrappers(read_weights(folder), model.state_dict().keys(), folder)
    weights = implementation.fit(weights, model)
    weights = _without_constants(weights, model, implementation, folder)
    faults = weight_faults(weights, model)
    if faults:
        hint = implementation.weights_hint(weights, config)
        raise ModelFolderError(
            f"the weights in {folder} are not those of its config.json: {'; '.join(faults)}{hint}"
        )
    for name, weight in weights.items():
        weights[name] = weight.to(implementation.weight_dtype(name, dtype))
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


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


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of `folder`, from whichever format it has. Raises ModelFolderError."""
    found = _found(folder)
    weights: dict[str, Tensor] = {}
    for path in found.files:
        more = _read_file(path, found.read)
        for name in weights.keys() & more.keys():
            if not torch.equal(weights[name], more[name]):
                raise ModelFolderError(f"{path} has {name} with other values than an earlier file")
        weights |= more
    return weights


def weight_files(folder: Path) -> list[Path]:
    """The files that `read_weights` reads, an index first. Raises ModelFolderError."""
    found = _found(folder)
    return found.files if found.index is None else [found.index, *found.files]


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


def _read_file(path: Path, read: Reader) -> dict[str, Tensor]:
    try:
        weights = read(path)
    except UnpicklingError as error:  # its message recommends to load the file unsafely
        raise ModelFolderError(
            f"{path} is damaged or contains objects other than tensors, which are never loaded:"
            " download it again, or convert it to model.safetensors where you trust it"
        ) from error
    except Exception as error:  # for damaged files the readers raise exceptions of any type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelFolderError(
            f"{path} is damaged or is not a weights file ({reason}): download it again"
        ) from error
    if not isinstance(weights, dict) or not all(map(_is_named_tensor, weights.items())):
        raise ModelFolderError(f"{path} does not contain a table of named tensors")
    return weights


def _is_named_tensor(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


@dataclass(frozen=True, slots=True)
class _Found:
    """Weight files, their index if there is one, and the function that reads a file."""

    read: Reader
    files: list[Path]
    index: Path | None = None


def _found(folder: Path) -> _Found:
    """The first format that the folder has: a single file before shards."""
    for name, read in _FORMATS.items():
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return _Found(read, [folder / name])
        if index.is_file():
            return _Found(read, _shards(folder, index), index)
    names = " or ".join(f"{name} (or {name}.index.json)" for name in _FORMATS)
    raise ModelFolderError(f"{folder} has no weights: it needs {names}")


def _shards(folder: Path, index: Path) -> list[Path]:
    """The shards that an index names, which must be in the same folder."""
    try:
        names = read_json(index)["weight_map"].values()
        shards = sorted({Path(name) for name in names})
    except ModelFolderError as error:
        raise ModelFolderError(f"{index} is not a weights index: {error}") from None
    except (KeyError, AttributeError, TypeError) as error:
        raise ModelFolderError(f"{index} is not a weights index: {error!r}") from error
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    for shard in shards:
        if shard.name != str(shard) or shard.suffix != suffix or not (folder / shard).is_file():
            raise ModelFolderError(
                f"{index} names {shard}, which is not a {suffix} file in its folder: download it"
                " again"
            )
    return [folder / shard for shard in shards]


def _read_bin(path: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return weights


_FORMATS: dict[str, Reader] = {"model.safetensors": load_file, "pytorch_model.bin": _read_bin}

"""Weights from the files of a Hugging Face folder into a model's modules.

Reads `model.safetensors`, `pytorch_model.bin` and sharded indices of either, and checks that they
hold exactly the model's keys and shapes. Nothing that a file brings is executed: a `.bin` is read
with `weights_only=True`, other pickles are never opened.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cottention.engine.errors import ModelFolderError
from cottention.engine.models.config import ModelConfig
from cottention.engine.models.registry import family_of

Reader = Callable[[Path], dict[str, Tensor]]


def load_model(folder: Path, config: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """The model of `folder` on the CPU, with weights in `dtype` where its family has no other.

    Raises ModelFolderError.
    """
    implementation = family_of(config).implementation()
    with torch.device("meta"):
        model: nn.Module = implementation.build(config)
    weights = read_weights(folder)
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


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of `folder`, from whichever format it has. Raises ModelFolderError."""
    found = _found(folder)
    weights: dict[str, Tensor] = {}
    for path in found.files:
        weights |= _read_file(path, found.read)
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
    ]


def _misshapen(weights: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> Iterator[str]:
    for name in expected.keys() & weights.keys():
        found = tuple(weights[name].shape)
        if found != expected[name]:
            yield f"{name} {list(found)} instead of {list(expected[name])}"


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
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        shards = sorted({Path(name) for name in names})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
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

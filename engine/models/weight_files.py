"""The files that have a model's weights: of a folder, or a single file.

Reads `model.safetensors`, `pytorch_model.bin` and sharded indices of either, and a `.pth` file.
Nothing that a file brings is executed: those of torch are read with `weights_only=True`, other
pickles are never opened.
"""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file
from torch import Tensor

from cottention.engine.errors import ModelFolderError
from cottention.engine.text.files import read_json

Reader = Callable[[Path], dict[str, Tensor]]


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
    """The first format that the folder has, a single file before shards; or the file itself."""
    if folder.is_file():
        return _Found(_read_pth, [folder])
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


def _read_pth(path: Path) -> dict[str, Tensor]:
    """The tensors, mapped into memory and read when they are used, where the format allows it."""
    is_zip = zipfile.is_zipfile(path)
    weights: dict[str, Tensor] = torch.load(path, "cpu", weights_only=True, mmap=is_zip)
    return weights


_FORMATS: dict[str, Reader] = {"model.safetensors": load_file, "pytorch_model.bin": _read_bin}

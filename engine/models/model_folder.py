"""Resolves a model's name, as a user gives it, to a folder or a single file on disk."""

import os
from pathlib import Path
from typing import NamedTuple

from cottention.engine.errors import ModelFolderError

DEFAULT_MODEL = Path(__file__).parents[1] / "pretrained" / "cottention-python-7m"

HUB_FILES = ["*.json", "*.txt", "*.jinja", "*.safetensors", "pytorch_model*.bin"]
"""Files downloaded from a Hugging Face repository: no pickles but weights."""


SINGLE_FILE = ".pth"
"""Ending of a file that is a model by itself: RWKV-7 is published so."""


class NamedFolder(NamedTuple):
    """A model's public name, and the folder of its files or its single file."""

    name: str
    folder: Path


def resolve_model(model: str | Path | None) -> NamedFolder:
    """A folder, a .pth file, a Hugging Face id, which is downloaded, or None for our own model.

    Raises ModelFolderError.
    """
    if model is None:
        return NamedFolder(DEFAULT_MODEL.name, DEFAULT_MODEL)
    folder = Path(
        os.path.expanduser(model)
    )  # os.path never raises for strings that cannot be a path
    if os.path.isdir(folder):
        return NamedFolder(_name_of(folder), folder)
    if os.path.isfile(folder) and folder.suffix == SINGLE_FILE:
        return NamedFolder(folder.stem, folder)
    if os.path.exists(folder):
        raise ModelFolderError(
            f"{model} is a file: give the model's folder; of single files only {SINGLE_FILE} files"
            " of RWKV-7 are models"
        )
    if not _looks_like_hub_id(str(model)):
        raise ModelFolderError(
            f"{model} does not exist: give a model folder or a Hugging Face id such as owner/name"
        )
    return NamedFolder(str(model), _fetch(str(model)))


def _name_of(folder: Path) -> str:
    """The last part of a path as it was given, and not of what a link leads to."""
    if folder.name not in ("", ".."):
        return folder.name
    if folder.name == "" and not folder.is_absolute():  # the working folder, as the shell names it
        shells = os.environ.get("PWD", "")
        if os.path.isdir(shells) and os.path.samefile(shells, folder):
            return Path(shells).name or shells
    return folder.resolve().name or str(folder)


def _looks_like_hub_id(model: str) -> bool:
    """owner/name, and not a path."""
    parts = model.split("/")
    return len(parts) == 2 and all(parts) and not model.startswith((".", "~"))


def _fetch(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=HUB_FILES))
    except HFValidationError as error:
        raise ModelFolderError(f"{repo_id} is not a folder and not a Hugging Face id") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelFolderError(
            f"{repo_id} is no folder here, is not in the cache and could not be fetched"
            f" from Hugging Face ({type(error).__name__})."
            f" Download config.json, tokenizer files and weights of {repo_id} into a folder"
            " on a machine with access, and give that folder instead"
        ) from error

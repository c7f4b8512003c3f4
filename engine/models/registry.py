"""The model families by the `model_type` of a config.json. Loads no torch."""

from pathlib import Path
from typing import Any

from cottention.engine.errors import ModelFolderError
from cottention.engine.models.bert.family import BERT
from cottention.engine.models.config import ModelConfig
from cottention.engine.models.family import AnyFamily
from cottention.engine.models.gptj.family import GPTJ
from cottention.engine.settings.declaration import shown
from cottention.engine.text.files import Report, read_json, warn

FAMILIES: dict[str, AnyFamily] = {family.model_type: family for family in (BERT, GPTJ)}


def find_family(model_type: object, where: str) -> AnyFamily:
    """The family of this name; `where` names the file in the message. Raises ModelFolderError."""
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = ", ".join(map(repr, sorted(FAMILIES)))
        raise ModelFolderError(
            f"{where}: model_type is {shown(model_type)}, which is not supported;"
            f" supported are: {known}"
        )
    return family


def family_of(config: ModelConfig) -> AnyFamily:
    """The family that a configuration belongs to."""
    return FAMILIES[config.model_type]


def parse_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """The configuration in a config.json's object. Raises ModelFolderError."""
    config: ModelConfig = find_family(raw.get("model_type"), where).config.from_dict(raw, where)
    return config


def read_config(folder: Path, report: Report = warn) -> ModelConfig:
    """Read and check `folder`/config.json. Raises ModelFolderError."""
    path = folder / "config.json"
    return parse_config(read_json(path, report), str(path))

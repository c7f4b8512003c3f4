"""The model families by the `model_type` of a config.json. Loads no torch."""

from pathlib import Path
from typing import Any

from cottention.engine.errors import ModelFolderError
from cottention.engine.models.bert.family import BERT
from cottention.engine.models.config import ModelConfig
from cottention.engine.models.family import AnyFamily
from cottention.engine.models.fla.family import FLA
from cottention.engine.models.gptj.family import GPTJ
from cottention.engine.models.mamba.config import ORIGINAL_FORMAT, is_original
from cottention.engine.models.mamba.family import MAMBA, MAMBA_2
from cottention.engine.models.rwkv7.family import RWKV7
from cottention.engine.settings.declaration import shown
from cottention.engine.text.files import Report, read_json, warn

_ALL: tuple[AnyFamily, ...] = (BERT, GPTJ, MAMBA, MAMBA_2, RWKV7, *FLA)

FAMILIES: dict[str, AnyFamily] = {family.model_type: family for family in _ALL}


OTHERS = {
    "falcon_h1": "Falcon-H1, a hybrid with softmax attention",
    "falcon_mamba": "Falcon Mamba",
    "granitemoehybrid": "Granite 4, a hybrid with softmax attention",
    "jamba": "Jamba, a hybrid with softmax attention and a mixture of experts",
    "kimi_linear": "Kimi Linear, a hybrid with softmax attention and a mixture of experts",
    "minimax": "MiniMax, a mixture of experts, in most models a hybrid with softmax attention",
    "minimax_text_01": "MiniMax, a hybrid with softmax attention and a mixture of experts",
    "nemotron_h": "Nemotron-H, a hybrid with softmax attention",
    "qwen3_next": "Qwen3-Next, a hybrid with softmax attention and a mixture of experts",
    "recurrent_gemma": "RecurrentGemma, a hybrid with softmax attention",
    "rwkv": "RWKV-4",
    "rwkv5": "RWKV-5",
    "rwkv6": "RWKV-6",
    "xlstm": "xLSTM",
    "zamba2": "Zamba2, a hybrid with softmax attention",
}
"""Models of the same kind that people may try, and that are not served."""


def find_family(model_type: object, where: str) -> AnyFamily:
    """The family of this name; `where` names the file in the message. Raises ModelFolderError."""
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        name = OTHERS.get(model_type) if isinstance(model_type, str) else None
        what = "" if name is None else f" ({name})"
        known = ", ".join(map(repr, sorted(FAMILIES)))
        raise ModelFolderError(
            f"{where}: model_type is {shown(model_type)}{what}, which is not supported;"
            f" supported are: {known}"
        )
    return family


def family_of(config: ModelConfig) -> AnyFamily:
    """The family that a configuration belongs to."""
    return FAMILIES[config.model_type]


def parse_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """The configuration in a config.json's object. Raises ModelFolderError."""
    if is_original(raw):
        raise ModelFolderError(f"{where}: this is a config.json of {ORIGINAL_FORMAT}")
    config: ModelConfig = find_family(raw.get("model_type"), where).config.from_dict(raw, where)
    return config


def read_config(folder: Path, report: Report = warn) -> ModelConfig:
    """Read and check `folder`/config.json; a single file is its own. Raises ModelFolderError."""
    if folder.is_file():
        return _of_file(folder)
    path = folder / "config.json"
    return parse_config(read_json(path, report), str(path))


def _of_file(path: Path) -> ModelConfig:
    """The configuration of a single file of weights, which only RWKV-7 is published as."""
    assert RWKV7.config_of_file is not None
    return RWKV7.config_of_file(path)

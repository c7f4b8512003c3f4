"""What generation_config.json says: ends of text, and the sampling that suits the model.

A model can do without the file. What is wrong in it is a warning that names file and reason.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cottention.engine.errors import ModelFolderError
from cottention.engine.models.config import token_ids
from cottention.engine.text.files import read_side_json

_log = logging.getLogger(__name__)

FILE_NAME = "generation_config.json"

SAMPLING_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Fields that are read, as vLLM reads them, and the sampling parameters that they set.

`do_sample` is ignored: a temperature of 0 asks for greedy text.
"""


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """The facts of a generation_config.json.

    eos_token_ids: as listed, whether or not the model has them.
    sampling: values of `SAMPLING_FIELDS` by the names that the file has, not yet checked.
    """

    eos_token_ids: tuple[int, ...] = ()
    sampling: Mapping[str, object] = field(default_factory=dict)


def read_generation_config(folder: Path) -> GenerationConfig:
    """Read `folder`/generation_config.json; what is absent or damaged leaves the defaults."""
    path = folder / FILE_NAME
    raw = read_side_json(path)
    eos_token_ids: tuple[int, ...] = ()
    try:
        eos_token_ids = token_ids(raw, "eos_token_id", str(path))
    except ModelFolderError as error:
        _log.warning("%s; it is ignored", error)
    sampling = {name: raw[name] for name in SAMPLING_FIELDS if raw.get(name) is not None}
    return GenerationConfig(eos_token_ids, sampling)

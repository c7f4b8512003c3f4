"""Which pooling a model folder asks for, in the `1_Pooling/config.json` of sentence-transformers.

Loads no torch.
"""

from pathlib import Path

from cottention.engine.errors import ModelFolderError
from cottention.engine.text.files import read_optional_json

FILE_NAME = "1_Pooling/config.json"

_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}


def read_pooling(folder: Path) -> str | None:
    """ "mean", "cls", "max" or "last"; None without the file.

    Raises ModelFolderError for one that names another mode, or several.
    """
    path = folder / FILE_NAME
    raw = read_optional_json(path)
    modes = [name for name, on in raw.items() if name.startswith("pooling_mode_") and on is True]
    if not raw:
        return None
    if len(modes) != 1 or modes[0] not in _MODES:
        found = ", ".join(modes) or "none"
        raise ModelFolderError(
            f"{path}: the pooling must be one of {', '.join(_MODES)}; it is {found}: give --pooling"
        )
    return _MODES[modes[0]]

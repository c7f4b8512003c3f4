"""Which `COTTENTION_` variables there are, and what is said at start-up of those that are not.

Knows every setting's name and no setting's meaning; never shows a value, which may be a key.
"""

import difflib
import logging
from collections.abc import Mapping
from dataclasses import fields

from cottention.engine.config import EngineConfig
from cottention.server.flags import VARIABLE_PREFIX, variable_of
from cottention.server.settings import GenerateConfig, ServerConfig

logger = logging.getLogger("cottention")

SETTINGS = (EngineConfig, ServerConfig, GenerateConfig)
OF_THE_OPS = ("cache", "cpu_isa", "cuda", "cxxflags", "ops")
NAMES = [*(each.name for kind in SETTINGS for each in fields(kind)), *OF_THE_OPS]
KNOWN = {variable_of(name): name for name in NAMES}


def warn_of_unknown(environ: Mapping[str, str]) -> None:
    """One line for each variable that is set and changes nothing, with the likeliest that would."""
    for variable in sorted(environ.keys() - KNOWN.keys()):
        if variable.startswith(VARIABLE_PREFIX) and environ[variable]:
            name = variable.removeprefix(VARIABLE_PREFIX).lower()
            near = difflib.get_close_matches(name, NAMES, 1)
            hint = f": did you mean {variable_of(near[0])}?" if near else ""
            logger.warning("there is no variable %s, and so it changes nothing%s", variable, hint)

"""The inference engine: a library without a web framework. `from cottention.engine import Engine`.

Names are loaded when they are first asked for, so that reading settings does not load torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cottention.engine.config import EngineConfig
    from cottention.engine.engine import Engine
    from cottention.engine.models.config import ModelConfig
    from cottention.engine.outputs import EngineStats, FinishReason, Output
    from cottention.engine.sampling_params import SamplingParams
    from cottention.engine.state.spec import StateSpec

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineStats",
    "FinishReason",
    "ModelConfig",
    "Output",
    "SamplingParams",
    "StateSpec",
]

_HOMES = {
    "Engine": "cottention.engine.engine",
    "EngineConfig": "cottention.engine.config",
    "EngineStats": "cottention.engine.outputs",
    "FinishReason": "cottention.engine.outputs",
    "ModelConfig": "cottention.engine.models.config",
    "Output": "cottention.engine.outputs",
    "SamplingParams": "cottention.engine.sampling_params",
    "StateSpec": "cottention.engine.state.spec",
}

# How often a thread of torch's pool looks for work before it sleeps. The pool's own measure is
# milliseconds, in which nobody else has that core: beside other processes, or in a container with a
# limit, every step then takes many times as long. It is read when torch is loaded, so it stands
# before all imports of torch; who has set it keeps it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Where a process has more such threads than there are cores, the pool looks a hundred times at
# most, and with this policy a thousand times. A server has more: the thread that loads the model
# has a pool, and so has the one that steps it, whose steps took a fifth longer.
os.environ.setdefault("OMP_WAIT_POLICY", "active")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

"""The entries of `mamba` and `mamba2` in the registry. Loads no torch until a model is loaded."""

from typing import TYPE_CHECKING, Any

from cottention.engine.models.family import ModelFamily, ModelImplementation
from cottention.engine.models.mamba.config import Mamba2Config, MambaConfig

if TYPE_CHECKING:
    from cottention.engine.models.mamba.model import MambaForCausalLM


def _implementation() -> "ModelImplementation[Any, MambaForCausalLM]":
    from cottention.engine.models.mamba.model import (
        MambaForCausalLM,
        renamed,
        weight_dtype,
        weights_hint,
    )

    return ModelImplementation(
        build=MambaForCausalLM,
        weight_dtype=weight_dtype,
        weights_hint=weights_hint,
        serve=MambaForCausalLM.serve,
        renamed=renamed,
    )


MAMBA = ModelFamily(config=MambaConfig, context_policy="exact", implementation=_implementation)
MAMBA_2 = ModelFamily(config=Mamba2Config, context_policy="exact", implementation=_implementation)

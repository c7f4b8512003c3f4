"""The entries of flash-linear-attention's models in the registry.

Loads no torch until a model is loaded.
"""

from typing import TYPE_CHECKING, Any

from cottention.engine.models.family import AnyFamily, ModelFamily, ModelImplementation
from cottention.engine.models.fla.config import (
    DeltaNetConfig,
    FLAConfig,
    GatedDeltaNetConfig,
    GLAConfig,
    HGRN2Config,
    RetNetConfig,
)

if TYPE_CHECKING:
    from cottention.engine.models.fla.model import FLAForCausalLM


def _implementation() -> "ModelImplementation[Any, FLAForCausalLM]":
    from cottention.engine.models.fla.model import FLAForCausalLM, renamed, weights_hint
    from cottention.engine.models.recurrent_model import weight_dtype

    return ModelImplementation(
        build=FLAForCausalLM,
        weight_dtype=weight_dtype,
        weights_hint=weights_hint,
        serve=FLAForCausalLM.serve,
        renamed=renamed,
    )


def _family(config: type[FLAConfig]) -> AnyFamily:
    return ModelFamily(config=config, context_policy="exact", implementation=_implementation)


FLA = tuple(
    _family(config)
    for config in (GLAConfig, RetNetConfig, HGRN2Config, DeltaNetConfig, GatedDeltaNetConfig)
)

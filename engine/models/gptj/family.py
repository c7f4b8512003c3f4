"""The `gptj` family's entry in the registry. Loads no torch until a model is loaded."""

from typing import TYPE_CHECKING

from cottention.engine.models.family import ModelFamily, ModelImplementation
from cottention.engine.models.gptj.config import GPTJConfig

if TYPE_CHECKING:
    from cottention.engine.models.gptj.model import CottentionForCausalLM


def _implementation() -> "ModelImplementation[GPTJConfig, CottentionForCausalLM]":
    from cottention.engine.models.gptj.inference import ServedGPTJ
    from cottention.engine.models.gptj.model import (
        CottentionForCausalLM,
        is_constant,
        weight_dtype,
        weights_hint,
    )

    return ModelImplementation(
        build=CottentionForCausalLM,
        weight_dtype=weight_dtype,
        weights_hint=weights_hint,
        serve=ServedGPTJ,
        is_constant=is_constant,
    )


GPTJ = ModelFamily(config=GPTJConfig, context_policy="renew", implementation=_implementation)

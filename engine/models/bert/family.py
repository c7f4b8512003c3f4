"""The `bert` family's entry in the registry. Loads no torch until a model is loaded."""

from typing import TYPE_CHECKING

from cottention.engine.models.bert.config import BertConfig
from cottention.engine.models.family import ModelFamily, ModelImplementation

if TYPE_CHECKING:
    from cottention.engine.models.bert.model import BertForPreTraining


def _implementation() -> "ModelImplementation[BertConfig, BertForPreTraining]":
    from cottention.engine.models.bert.inference import ServedBert
    from cottention.engine.models.bert.model import (
        BertForPreTraining,
        fit_to,
        is_constant,
        weight_dtype,
        weights_hint,
    )

    return ModelImplementation(
        build=BertForPreTraining,
        weight_dtype=weight_dtype,
        weights_hint=weights_hint,
        serve=ServedBert,
        is_constant=is_constant,
        fit=fit_to,
    )


BERT = ModelFamily(config=BertConfig, context_policy="exact", implementation=_implementation)

"""The `rwkv7` family's entry in the registry. Loads no torch until weights are read."""

from pathlib import Path
from typing import TYPE_CHECKING

from cottention.engine.models.family import ModelFamily, ModelImplementation
from cottention.engine.models.rwkv7.config import RWKV7Config

if TYPE_CHECKING:
    from cottention.engine.models.rwkv7.model import RWKV7ForCausalLM


def _implementation() -> "ModelImplementation[RWKV7Config, RWKV7ForCausalLM]":
    from cottention.engine.models.rwkv7.model import RWKV7ForCausalLM
    from cottention.engine.models.rwkv7.weights import (
        completed,
        renamed,
        weight_dtype,
        weights_hint,
    )

    return ModelImplementation(
        build=RWKV7ForCausalLM,
        weight_dtype=weight_dtype,
        weights_hint=weights_hint,
        serve=RWKV7ForCausalLM.serve,
        renamed=renamed,
        completed=completed,
    )


def _of_file(path: Path) -> RWKV7Config:
    """The configuration of a .pth file, whose weights are not read but for their shapes."""
    from cottention.engine.models.weight_files import read_weights

    weights = read_weights(path)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    dtype = str(weights["emb.weight"].dtype if "emb.weight" in weights else "")
    return RWKV7Config.from_shapes(shapes, dtype.removeprefix("torch."), str(path))


RWKV7 = ModelFamily(
    config=RWKV7Config,
    context_policy="exact",
    implementation=_implementation,
    config_of_file=_of_file,
)

"""The kinds of attention by the `attention_type` of a config.json. Loads no torch."""

from cottention.engine.models.gptj.feature_maps.base import FeatureMap
from cottention.engine.models.gptj.feature_maps.cosformer import CosFormer
from cottention.engine.models.gptj.feature_maps.cottention import Cottention
from cottention.engine.models.gptj.feature_maps.linear import Linear
from cottention.engine.models.gptj.feature_maps.performer import Performer
from cottention.engine.models.gptj.feature_maps.rfa import RFA, GatedRFA
from cottention.engine.models.gptj.feature_maps.softmax import Softmax

ATTENTION_KINDS: dict[str, FeatureMap] = {
    "cottention": Cottention(),
    "cosformer": CosFormer(),
    "linear": Linear(),
    "performer": Performer(),
    "rfa": RFA(),
    "gated_rfa": GatedRFA(),
    "softmax": Softmax(),
}
"""All kinds that are trained and measured; softmax is for comparison and cannot be served."""

RECURRENT_KINDS = tuple(name for name, kind in ATTENTION_KINDS.items() if kind.is_recurrent)
"""The kinds that are served."""

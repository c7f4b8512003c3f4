"""Each kind of attention: the shape of its state, and whether it is served. Loads no torch.

`attention.py` has the arithmetic.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """One kind of attention, as a model folder's `attention_type` names it.

    key_widths_per_head: width K of the mapped queries and keys, in widths of a head.
    description: of a model with it, for its card, such as "causal cosFormer (arXiv 2202.08791)".
    has_denominator: outputs are divided by the sum of their scores.
    has_norm_const: the model learns m, one scalar per head.
    is_recurrent: it has a state of fixed size, so that it can be served.
    """

    description: str
    key_widths_per_head: int = 1
    has_denominator: bool = False
    has_norm_const: bool = False
    is_recurrent: bool = True

    def key_width(self, head_dim: int) -> int:
        """Width K of the mapped queries and keys for heads of `head_dim`."""
        return self.key_widths_per_head * head_dim


ATTENTION_KINDS = {
    "cottention": AttentionKind(
        "causal Cottention model (arXiv 2409.18747: cosine similarity in place of softmax)",
        has_norm_const=True,
    ),
    "cosformer": AttentionKind(
        "causal cosFormer (arXiv 2202.08791: ReLU reweighted by the cosine of the distance)",
        key_widths_per_head=2,
        has_denominator=True,
    ),
    "linear": AttentionKind(
        "causal linear transformer (arXiv 2006.16236: elu + 1 in place of softmax)",
        has_denominator=True,
    ),
    "softmax": AttentionKind("causal transformer with softmax attention", is_recurrent=False),
}
"""All kinds that are trained and measured; softmax is for comparison and cannot be served."""

RECURRENT_KINDS = tuple(name for name, kind in ATTENTION_KINDS.items() if kind.is_recurrent)
"""The kinds that are served."""

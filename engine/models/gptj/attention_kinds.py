"""Each kind of attention: the shape of its state, and whether it is served. Loads no torch.

`attention.py` has the arithmetic.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """One kind of attention, as a model folder's `attention_type` names it.

    key_widths_per_head: width K of the mapped queries and keys, in widths of a head.
    has_denominator: outputs are divided by the sum of their scores.
    has_norm_const: the model learns m, one scalar per head.
    is_recurrent: it has a state of fixed size, so that it can be served.
    """

    key_widths_per_head: int = 1
    has_denominator: bool = False
    has_norm_const: bool = False
    is_recurrent: bool = True

    def key_width(self, head_dim: int) -> int:
        """Width K of the mapped queries and keys for heads of `head_dim`."""
        return self.key_widths_per_head * head_dim


ATTENTION_KINDS = {
    "cottention": AttentionKind(has_norm_const=True),
    "cosformer": AttentionKind(key_widths_per_head=2, has_denominator=True),
    "linear": AttentionKind(has_denominator=True),
    "softmax": AttentionKind(is_recurrent=False),
}
"""All kinds that are trained and measured; softmax is for comparison and cannot be served."""

RECURRENT_KINDS = tuple(name for name, kind in ATTENTION_KINDS.items() if kind.is_recurrent)
"""The kinds that are served."""

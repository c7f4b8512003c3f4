"""What a kind of attention consists of: facts of its state, and its map of queries and keys.

A module of this package has one kind; `attention_kinds.py` lists them. They are imported where a
configuration is read without torch, so they import torch and the ops within their functions.

Letters: N tokens, H heads, D head width, K key width, V value width, C channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from cottention.engine.models.recurrence import Recurrence


class AttentionConfig(Protocol):
    """The settings of a model that its attention may depend on; `GPTJConfig` has them."""

    @property
    def n_head(self) -> int:
        """Number of heads, H."""
        ...

    @property
    def head_dim(self) -> int:
        """Channels per head, D."""
        ...

    @property
    def n_positions(self) -> int:
        """Tokens that the model was trained to follow."""
        ...

    @property
    def cosformer_max_length(self) -> int | None:
        """cosFormer's M; None: `n_positions`."""
        ...

    @property
    def num_random_features(self) -> int | None:
        """Random features per head of Performer and RFA; None: the map's default."""
        ...


@dataclass(frozen=True, slots=True)
class TokenPositions:
    """Positions of a batch's N tokens and what depends on them alone, computed once per step.

    index: int64 [N], each token's position in its own sequence, from 0.
    cos, sin: [N, rotary_dim / 2], the rotary angles of those positions; no columns without rotary.
    table: [N, ·], what the feature map's `position_table` returned.
    """

    index: "Tensor"
    cos: "Tensor"
    sin: "Tensor"
    table: "Tensor | None" = None


FusedAttention = Callable[
    ["Tensor", "Tensor", TokenPositions, Sequence["Tensor"], "Recurrence", int, "Tensor"], None
]
"""(normed [N, C], joined [N, 3C + inner], positions, a layer's weights of the map, recurrence,
layer, out [N, C + inner]): from a layer's first product of `normed` to its second; `joined` has q,
k, v and the MLP's input."""

FusedLayers = Callable[
    ["Tensor", Sequence["Tensor"], float, TokenPositions, "Recurrence", Sequence["Tensor"]], None
]
"""(x [N, C], weights of all blocks, epsilon of the norms, positions, recurrence, scratch buffers):
all blocks of a packed model, x in place, as `ops.cottention_layers`."""


class FeatureMap(ABC):
    """One kind of attention, as a model folder's `attention_type` names it. Has no state.

    description: of a model with it, for its card, such as "causal cosFormer (arXiv 2202.08791)".
    has_denominator: outputs are divided by the sum of their scores.
    is_recurrent: it has a state of fixed size, so that it can be served.
    weight_names: names of what `add_weights` adds, as in the state dict of an attention.
    reads_input: `gate` computes something of the attention's input, which must not be rounded.
    delays_updates: `fused_attention` can leave to later steps what it adds to a state.
    """

    description: ClassVar[str]
    has_denominator: ClassVar[bool] = False
    is_recurrent: ClassVar[bool] = True
    weight_names: ClassVar[tuple[str, ...]] = ()
    reads_input: ClassVar[bool] = False
    delays_updates: ClassVar[bool] = False

    @abstractmethod
    def features(
        self, q: "Tensor", k: "Tensor", v: "Tensor", at: TokenPositions, weights: Sequence["Tensor"]
    ) -> "tuple[Tensor, Tensor, Tensor]":
        """What the recurrence is fed: q, k [..., N, H, K] and v [..., N, H, V].

        q, k, v: [..., N, H, D], float32 or wider, before rotary embedding. weights: what
        `prepared_weights` returned for this layer. In float32 on a CPU the bits of a row must not
        depend on the other rows.
        """

    def key_width(self, config: AttentionConfig) -> int:
        """Width K of the mapped queries and keys of one head."""
        return config.head_dim

    def value_width(self, config: AttentionConfig) -> int:
        """Width V of the mapped values of one head."""
        return config.head_dim

    def outputs(self, mixed: "Tensor") -> "Tensor":
        """What the recurrence returned, [..., N, H, V], to the attention's outputs [..., N, H, D].

        In float32 on a CPU the bits of a row must not depend on the other rows.
        """
        return mixed

    def gate(self, _x: "Tensor", _weights: Sequence["Tensor"]) -> "Tensor | None":
        """The share g [..., N, H] of its state that a head keeps at each token; None: all of it.

        The values of the token are multiplied by 1 − g. x: the attention's input [..., N, C],
        float32 or wider. weights: as in `features`. In float32 on a CPU the bits of a row must not
        depend on the other rows.
        """
        return None

    def max_exact_length(self, _config: AttentionConfig) -> int | None:
        """Tokens after which the map means nothing, if there is such a limit."""
        return None

    def position_table(
        self, _config: AttentionConfig, _positions: "Tensor", _dtype: "torch.dtype"
    ) -> "Tensor | None":
        """What depends on int64 positions [N], from 0, alone: [N, ·] in `dtype`, for all layers."""
        return None

    def add_weights(self, attention: "nn.Module", config: AttentionConfig) -> None:  # noqa: B027
        """Register the map's own weights, with initial values, on the attention of one layer.

        Parameters are trained, buffers are not; both are read from the weights files, where a layer
        has them as `attn.NAME`, and stay float32 in a model of any type.
        """

    def prepared_weights(self, _attention: "nn.Module") -> "tuple[Tensor, ...]":
        """What `features` takes of one layer's own weights: computed once where it is served."""
        return ()

    @property
    def fused_attention(self) -> FusedAttention | None:
        """Map, recurrence and gelu in compiled ops, equal to the separate ones to rounding.

        On the CPU, where there is one, to the bit.
        """
        return None

    @property
    def fused_layers(self) -> FusedLayers | None:
        """A compiled op for all blocks of a packed model, equal to the separate ops to the bit."""
        return None

"""What the recurrent families share: the frame of a model, its products, norms and convolutions.

A family's modules are the definition, in any dtype and on any device, under the published names.
`serve` arranges the same modules for inference: weights that are multiplied together are stacked,
packed on a CPU, and freed under their own names. Activations are float32 or wider.

Letters: N tokens, C channels, W width of a convolution.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, Protocol, Self, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cottention.engine import ops
from cottention.engine.models.recurrence import Recurrence

TablesT = TypeVar("TablesT")
"""What the layers of one step share, such as rotary tables."""


class Servable(Protocol):
    """Something that can be arranged for inference, once."""

    def serve(self, device: str) -> None:
        """Take over the weights of the modules that it was made of."""
        ...


class Product:
    """The products of one input with several linear layers: x [N, C] → [N, sum of widths].

    Computed in the type of the weights, and given in that of x.
    """

    def __init__(self, *linears: nn.Linear) -> None:
        self._linears = linears
        self._arranged: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self._arranged(x) if self._arranged else _product(x, *self._stacked())

    def _stacked(self) -> tuple[Tensor, Tensor | None]:
        weight = _joined([linear.weight for linear in self._linears])
        biases = [linear.bias for linear in self._linears]
        if all(bias is None for bias in biases):
            return weight, None
        zeros = [weight.new_zeros(linear.out_features) for linear in self._linears]
        chosen = [zero if bias is None else bias for bias, zero in zip(biases, zeros, strict=True)]
        return weight, _joined(chosen)

    @property
    def packed(self) -> ops.FixedOrderLinear | None:
        """The served product where its weights are packed for the compiled ops, else None."""
        served = self._arranged
        return served if isinstance(served, ops.FixedOrderLinear) and served.is_packed else None

    def serve(self, device: str) -> None:
        self._arranged = served_product(*self._stacked(), device)
        for linear in self._linears:
            linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)


def served_product(weight: Tensor, bias: Tensor | None, device: str) -> Callable[[Tensor], Tensor]:
    """x Wᵀ + bias on `device`; on a CPU the bits of a row do not depend on the other rows."""
    if device != "cpu":
        weight, bias = weight.to(device), None if bias is None else bias.to(device)
        return lambda x: _product(x, weight, bias)
    if ops.can_pack(weight):
        return ops.FixedOrderLinear(weight, bias)
    linear = ops.FixedOrderLinear(weight.clone(), bias)  # a clone: a file may not stay mapped
    return lambda x: linear(x.to(weight.dtype)).to(x.dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return ops.wide_product(x, weight, bias).to(x.dtype)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat([*tensors])


class Convolution:
    """Short convolutions side by side, each depthwise and causal (`ops.short_convolution`)."""

    def __init__(self, *convolutions: nn.Conv1d) -> None:
        self._convolutions = convolutions
        self._arranged: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, x: Tensor, index: int, recurrence: Recurrence) -> Tensor:
        """x [N, C] of layer `index` → [N, C]; the rows of the pool's `conv` are moved on."""
        weight, bias = self.arranged
        tails, rows = recurrence.tensors["conv"][:, index], recurrence.segments
        return ops.short_convolution(x, weight, bias, tails, rows.state_indices, rows.cu_seqlens)

    @property
    def arranged(self) -> tuple[Tensor, Tensor | None]:
        """Weight [W, C] and bias [C] or None, of all convolutions."""
        return self._arranged or self._stacked()

    def _stacked(self) -> tuple[Tensor, Tensor | None]:
        weight = _joined([each.weight for each in self._convolutions])
        biases = [each.bias for each in self._convolutions if each.bias is not None]
        return weight.squeeze(1).T.contiguous(), _joined(biases) if biases else None

    def serve(self, device: str) -> None:
        weight, bias = self._stacked()
        self._arranged = weight.to(device), None if bias is None else bias.to(device)


def short_convolution(channels: int, width: int, *, bias: bool) -> nn.Conv1d:
    """The module whose weights, [C, 1, W] and [C], a `Convolution` computes with."""
    return nn.Conv1d(channels, channels, width, groups=channels, bias=bias)


class RMSNorm(nn.Module):
    """weight · x / √(mean(x²) + ε), the mean over each of `groups` parts of a row.

    With `heads` a weight of that part of the row is used for each of them in turn. Without
    `has_weight` it is 1.
    """

    def __init__(
        self,
        width: int,
        epsilon: float,
        *,
        groups: int = 1,
        heads: int = 1,
        has_weight: bool = True,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if has_weight else None
        self._width = width * heads
        self._heads = heads
        self._groups = groups * heads
        self._epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """x [N, width · heads] → the same shape."""
        weight = x.new_ones(self._width) if self.weight is None else self.weight
        if self._heads > 1 and self.weight is not None:
            weight = self.weight.repeat(self._heads)
        return ops.rms_norm(x, weight, self._epsilon, self._groups)


class RecurrentBlock(nn.Module, Generic[TablesT]):
    """One layer; a family's own. `parts` are arranged when the model is served."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[Servable] = []

    def advance(self, x: Tensor, index: int, tables: TablesT, recurrence: Recurrence) -> Tensor:
        """x [N, C] before layer `index` → x after it; the batch's rows are updated."""
        raise NotImplementedError

    def serve(self, device: str) -> None:
        """Arrange the layer for inference on `device`."""
        for part in self.parts:
            part.serve(device)
        _move(self, device)


class Trunk(nn.Module):
    """Embeddings, layers and the last norm, whose name is the family's."""

    def __init__(
        self,
        vocab_size: int,
        width: int,
        layers: Iterable[RecurrentBlock[Any]],
        norm_name: str,
        norm: nn.Module,
    ) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(layers)
        self.add_module(norm_name, norm)
        self.last_norm_name = norm_name


class RecurrentModel(nn.Module, Generic[TablesT]):
    """A `ServedModel` in any dtype: embeddings, layers, the last norm and the head.

    Tied models have no head of their own: the embeddings are it.
    """

    def __init__(self, trunk_name: str, trunk: Trunk, *, is_tied: bool) -> None:
        super().__init__()
        self.add_module(trunk_name, trunk)
        vocab_size, width = trunk.embeddings.weight.shape
        self.lm_head = None if is_tied else nn.Linear(width, vocab_size, bias=False)
        self._trunk_name = trunk_name
        self._head: Callable[[Tensor], Tensor] | None = None
        # All layers in one call, with the same bits: some families where they are served.
        self.fused: Callable[[Tensor, Recurrence], Tensor] | None = None

    @property
    def _trunk(self) -> Trunk:
        return cast(Trunk, self.get_submodule(self._trunk_name))

    def hidden(self, ids: Tensor, positions: Tensor, recurrence: Recurrence) -> Tensor:
        """ids and positions int64 [N] → hidden states [N, C] before the last norm."""
        x = F.embedding(ids, self._trunk.embeddings.weight)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.fused is not None:
            return self.fused(x, recurrence)
        tables = self.step_tables(positions, x.dtype)
        for index, layer in enumerate(self._layers()):
            x = layer.advance(x, index, tables, recurrence)
        return x

    def step_tables(self, positions: Tensor, dtype: torch.dtype) -> TablesT:
        """What the layers of one step share; a family's own."""
        raise NotImplementedError

    def _layers(self) -> Iterable[RecurrentBlock[TablesT]]:
        return cast(Iterable[RecurrentBlock[TablesT]], self._trunk.layers)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, C] → logits [R, vocab_size], float32 or wider."""
        x: Tensor = self._trunk.get_submodule(self._trunk.last_norm_name)(hidden)
        if self._head is not None:
            return self._head(x)
        return _product(x, self._head_weight(), None)

    def serve(self, device: str) -> Self:
        """The same model arranged for inference, part by part, so that weights are there once."""
        trunk = self._trunk
        self._head = served_product(self._head_weight(), None, device)
        self.lm_head = None
        for layer in self._layers():
            layer.serve(device)
        _move(trunk.embeddings, device)
        _move(trunk.get_submodule(trunk.last_norm_name), device)
        return self

    def _head_weight(self) -> Tensor:
        head = self._trunk.embeddings if self.lm_head is None else self.lm_head
        return head.weight


def _move(module: nn.Module, device: str) -> None:
    """To `device`, as copies: a view of the weights file would keep it mapped."""
    for weight in module.parameters():
        weight.data = weight.data.to(device, copy=True)


_MATRIX = re.compile(r"(_proj(\.\d)?\.(weight|bias)|embeddings\.weight|lm_head\.weight)$")


def weight_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Matrices are kept in the model's dtype; norms, decays and convolutions in float32."""
    return dtype if _MATRIX.search(name) else torch.float32


def with_tied_head(
    weights: dict[str, Tensor], embeddings: str, *, is_tied: bool
) -> dict[str, Tensor]:
    """The weights with `lm_head.weight` where the model has one, and without where it is tied.

    A file without it means the embeddings, whatever its configuration says; in a tied model it is
    the embeddings once more.
    """
    if is_tied:
        return {name: weight for name, weight in weights.items() if name != "lm_head.weight"}
    if embeddings in weights and "lm_head.weight" not in weights:
        return weights | {"lm_head.weight": weights[embeddings]}
    return weights

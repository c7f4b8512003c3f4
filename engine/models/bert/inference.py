"""The encoder as it is served: two passes over the rows of a layer, in chunks of any size.

The first pass needs keys and values alone, the second queries alone, so that nothing is computed
twice. In float32 on a CPU a row's bits depend neither on the chunk that it is in nor on the other
texts of a batch: products, norms and gelu are those of a row, and a state sums its text in token
order.

Letters: R rows of a chunk, C channels, H heads, D head width, K key width, V value width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cottention.engine import ops
from cottention.engine.models.bert.attention import FEATURE_MAPS, FeatureMap
from cottention.engine.models.bert.config import BertConfig
from cottention.engine.models.bert.model import BertForPreTraining, Layer, Predictions
from cottention.engine.models.encoder import EncoderRows
from cottention.engine.models.recurrence import Features

Rows = Callable[[Tensor], Tensor]
"""x [R, in] → [R, out]."""


class ServedBert:
    """A `BertForPreTraining` arranged for inference.

    The weights are moved out of the model layer by layer, so that they are in memory once. Token
    types are 0. Pooler and seq_relationship are not served.
    """

    def __init__(self, model: BertForPreTraining, device: str) -> None:
        config = model.config
        self.num_layers, self.width = config.num_hidden_layers, config.hidden_size
        embeddings = model.bert.embeddings
        # copies: the originals may be views of the weights file, which would remain mapped
        self._words = embeddings.word_embeddings.weight.to(device, copy=True)
        self._places = embeddings.position_embeddings.weight.to(device, copy=True)
        self._type = embeddings.token_type_embeddings.weight[0].to(device, copy=True)
        self._norm = _norm(embeddings.LayerNorm, device)
        self._head: ServedPredictions | None = None
        if model.cls.predictions is not None:
            self._head = ServedPredictions(model.cls.predictions, device)
        self.has_predictions = self._head is not None
        del model.bert.embeddings, model.cls
        feature_map: FeatureMap = FEATURE_MAPS[config.attention_type](config)
        self._layers = [
            ServedLayer(config, layer, feature_map, device) for layer in model.take_layers()
        ]

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids, positions int64 [R] → rows float32 [R, C] of the stream before the first layer."""
        x = self._words[ids].float() + self._type.float()
        return self._norm(x + self._places[positions].float())

    def accumulate(self, layer: int, x: Tensor, rows: EncoderRows) -> None:
        """First pass: add the rows x [R, C] to the states of their texts."""
        self._layers[layer].accumulate(x, rows)

    def update(self, layer: int, x: Tensor, rows: EncoderRows) -> None:
        """Second pass, once the states are whole: replace x [R, C] by the layer's output."""
        self._layers[layer].update(x, rows)

    def predictions(self, hidden: Tensor) -> Tensor:
        """Last hidden states [R, C] → logits float32 [R, vocab_size] of the masked tokens."""
        assert self._head is not None
        return self._head(hidden)


class ServedLayer:
    """One layer of the encoder."""

    def __init__(
        self, config: BertConfig, layer: Layer, feature_map: FeatureMap, device: str
    ) -> None:
        attention = layer.attention
        self._heads = config.num_attention_heads
        self._map = feature_map
        self._sigma = attention.self.sigma().to(device)
        key, value = attention.self.key, attention.self.value
        self._keys_values = _product(
            torch.cat([key.weight, value.weight]), torch.cat([key.bias, value.bias]), device
        )
        self._queries = _linear(attention.self.query, device)
        self._attention_out = _linear(attention.output.dense, device)
        self._attention_norm = _norm(attention.output.LayerNorm, device)
        self._mlp_in = _linear(layer.intermediate.dense, device)
        self._mlp_out = _linear(layer.output.dense, device)
        self._norm = _norm(layer.output.LayerNorm, device)

    def accumulate(self, x: Tensor, rows: EncoderRows) -> None:
        k, v = self._keys_values(x).chunk(2, dim=-1)
        k, v = self._map.keys_values(
            self._split(k), self._split(v), rows.positions, rows.lengths, self._sigma
        )
        rows.recurrence(0, Features(k, k, v))  # what it reads is of no use before the text's end

    def update(self, x: Tensor, rows: EncoderRows) -> None:
        q = self._map.queries(self._split(self._queries(x)), rows.positions)
        nothing = torch.zeros_like(q), q.new_zeros(*q.shape[:2], x.shape[1] // self._heads)
        attended = rows.recurrence(0, Features(q, *nothing)).flatten(-2)
        y = self._attention_norm(x + self._attention_out(attended))
        inner = ops.gelu_erf(self._mlp_in(y))
        x.copy_(self._norm(y + self._mlp_out(inner)))

    def _split(self, x: Tensor) -> Tensor:
        """[R, C] → [R, H, D]."""
        heads: Tensor = x.unflatten(-1, (self._heads, -1))
        return heads


class ServedPredictions:
    """The head that predicts masked tokens."""

    def __init__(self, head: Predictions, device: str) -> None:
        self._dense = _linear(head.transform.dense, device)
        self._norm = _norm(head.transform.LayerNorm, device)
        self._decoder = _linear(head.decoder, device)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[R, C] → logits float32 [R, vocab_size]."""
        return self._decoder(self._norm(ops.gelu_erf(self._dense(hidden))))


def _linear(linear: nn.Linear, device: str) -> Rows:
    return _product(linear.weight, linear.bias, device)


def _product(weight: Tensor, bias: Tensor, device: str) -> Rows:
    """x Wᵀ + bias, float32 → float32. On a CPU a row's bits do not depend on other rows."""
    weight, bias = weight.to(device), bias.to(device)
    if device == "cpu" and (weight.dtype == torch.float32 or ops.can_pack(weight)):
        return ops.FixedOrderLinear(weight, bias)
    return lambda x: nn.functional.linear(x.to(weight.dtype), weight, bias).float()


def _norm(norm: nn.LayerNorm, device: str) -> Rows:
    """LayerNorm in float32, whatever the type of the weights."""
    if device == "cpu" and ops.backend() == "compiled":
        return ops.FixedOrderNorm(norm.weight, norm.bias, norm.eps)
    return norm.to(device, torch.float32)

"""The definition of a bidirectional encoder in a BERT's shape: from token ids to logits.

Modules are named as the published weights are. The heads are parts that a folder may lack.

Letters: B texts, T places of a text, H heads, D head width, C channels.
"""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from cottention.engine import ops
from cottention.engine.errors import ModelFolderError
from cottention.engine.models.bert.attention import FEATURE_MAPS, FeatureMap
from cottention.engine.models.bert.config import BertConfig
from cottention.engine.ops import reference


class Embeddings(nn.Module):
    """Word, position and token-type embeddings, summed and normed."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """int64 [B, T] each → [B, T, C]."""
        x = self.word_embeddings(ids) + self.token_type_embeddings(token_type_ids)
        positions = torch.arange(ids.shape[-1], device=ids.device)
        out: Tensor = self.LayerNorm(x + self.position_embeddings(positions))
        return out


class SelfAttention(nn.Module):
    """Projections, and with Cottention m, one learned scalar per head (eq. 5, arXiv 2409.18747)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self._num_heads = config.num_attention_heads
        self._has_denominator = config.attention_type == "cosformer"
        self._map: FeatureMap = FEATURE_MAPS[config.attention_type](config)
        self.norm_const: nn.Parameter | None = None
        if config.attention_type == "cottention":
            self.norm_const = nn.Parameter(torch.full((1, self._num_heads, 1, 1), 0.5))

    def sigma(self) -> Tensor:
        """σ(m), float64 [H]: values are divided by s^σ(m). Zeros where there is no m."""
        if self.norm_const is None:
            return torch.zeros(
                self._num_heads, dtype=torch.float64, device=self.query.weight.device
            )
        return torch.sigmoid(self.norm_const.double()).flatten()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, C], mask bool [B, T], true where there is a token → [B, T, C].

        Places without a token get no weight, and do not count in s.
        """
        positions = torch.arange(x.shape[1], device=x.device)
        texts = [self._of_text(*each, positions) for each in zip(x, mask, strict=True)]
        return torch.stack(texts)

    def _of_text(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """x [T, C] and mask bool [T] → [T, C]."""
        q, k, v = (
            each(x).unflatten(-1, (self._num_heads, -1)) * mask[:, None, None]
            for each in (self.query, self.key, self.value)
        )
        lengths = mask.sum().clamp_min(1).expand(len(x))
        k, v = self._map.keys_values(k, v, positions, lengths, self.sigma())
        q = self._map.queries(q, positions)
        q, k, v = (each.transpose(0, 1) for each in (q, k, v))  # [H, T, ·]
        out = reference.bidirectional(q, k, v, denominator=self._has_denominator)
        return out.transpose(0, 1).flatten(-2)


class AddNorm(nn.Module):
    """LayerNorm(residual + dense(x))."""

    def __init__(self, in_features: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x [..., in_features] and residual [..., C] → [..., C]."""
        out: Tensor = self.LayerNorm(residual + self.dense(x))
        return out


class Attention(nn.Module):
    """Attention over a text, added to its input and normed."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = AddNorm(config.hidden_size, config)


class Intermediate(nn.Module):
    """The first linear layer of the MLP."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)


class Layer(nn.Module):
    """Attention and MLP, each followed by a norm (post-norm)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = AddNorm(config.intermediate_size, config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, C], mask bool [B, T] → [B, T, C]."""
        x = self.attention.output(self.attention.self(x, mask), x)
        out: Tensor = self.output(ops.gelu_erf(self.intermediate.dense(x)), x)
        return out


class Encoder(nn.Module):
    """All layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class Pooler(nn.Module):
    """tanh(dense(x)) of the first token; only `seq_relationship` reads it."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)


class Bert(nn.Module):
    """Embeddings and layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler: Pooler | None = Pooler(config)


class Transform(nn.Module):
    """Dense, gelu and norm before the decoder of the predictions."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class Predictions(nn.Module):
    """The head that predicts masked tokens."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = Transform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., C] → logits [..., vocab_size]."""
        x = self.transform.LayerNorm(ops.gelu_erf(self.transform.dense(hidden)))
        out: Tensor = self.decoder(x)
        return out


class Heads(nn.Module):
    """The heads of pre-training."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions: Predictions | None = Predictions(config)
        self.seq_relationship: nn.Linear | None = nn.Linear(config.hidden_size, 2)


class BertForPreTraining(nn.Module):
    """The whole model. `fit_to` removes the parts that a folder does not have."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        self.cls = Heads(config)

    def forward(self, ids: Tensor, mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """ids, token_type_ids int64 and mask bool [B, T] → last hidden states [B, T, C]."""
        x: Tensor = self.bert.embeddings(ids, token_type_ids)
        for layer in self.layers():
            x = layer(x, mask)
        return x

    def seq_relationship(self, hidden: Tensor) -> Tensor:
        """Last hidden states [B, T, C] → logits [B, 2]: is the second segment the next one?"""
        assert self.bert.pooler is not None
        assert self.cls.seq_relationship is not None
        logits: Tensor = self.cls.seq_relationship(self.bert.pooler.dense(hidden[:, 0]).tanh())
        return logits

    def layers(self) -> list[Layer]:
        """The layers, in order."""
        return list(cast(Iterable[Layer], self.bert.encoder.layer))

    def take_layers(self) -> Iterator[Layer]:
        """The layers, in order. Each is removed from the model as it is yielded."""
        while len(self.bert.encoder.layer):
            yield cast(Layer, self.bert.encoder.layer.pop(0))


def fit_to(weights: dict[str, Tensor], model: BertForPreTraining) -> dict[str, Tensor]:
    """The weights of a folder under the model's names; the model loses the heads that they lack.

    A bare encoder's names have no prefix. The decoder is the word embeddings where it is missing
    and they are tied; its bias may also be named `cls.predictions.bias`. Raises ModelFolderError
    where both biases are there and differ.
    """
    if not any(name.startswith(("bert.", "cls.")) for name in weights):
        weights = {f"bert.{name}": weight for name, weight in weights.items()}
    if not _has_any(weights, "bert.pooler."):
        model.bert.pooler = None
    if not _has_any(weights, "cls.seq_relationship."):
        model.cls.seq_relationship = None
    if not _has_any(weights, "cls.predictions."):
        model.cls.predictions = None
    return _with_decoder(dict(weights), model.config)


def _has_any(weights: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in weights)


def _with_decoder(weights: dict[str, Tensor], config: BertConfig) -> dict[str, Tensor]:
    bias, decoder = "cls.predictions.bias", "cls.predictions.decoder"
    if bias in weights:
        own = weights.pop(bias)
        if not torch.equal(weights.setdefault(f"{decoder}.bias", own), own):
            raise ModelFolderError(
                f"the weights have {bias} and {decoder}.bias with different values: they are one"
            )
    word = weights.get("bert.embeddings.word_embeddings.weight")
    if word is not None and config.tie_word_embeddings and _has_any(weights, "cls.predictions."):
        weights.setdefault(f"{decoder}.weight", word)
    return weights


def weight_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a weight is kept: Cottention's m is float32 in a model of any type."""
    return torch.float32 if name.endswith("norm_const") else dtype


def is_constant(name: str, shape: tuple[int, ...]) -> bool:
    """Whether this is the table 0, 1, 2, ... that transformers stored with the embeddings."""
    return name.removeprefix("bert.") == "embeddings.position_ids" and shape[:1] == (1,)


def weights_hint(names: Iterable[str], config: BertConfig) -> str:
    """What attention_type should be, where weights of another kind of attention lie beside it."""
    has_norm_const = any(name.endswith("norm_const") for name in names)
    if has_norm_const == (config.attention_type == "cottention"):
        return ""
    if has_norm_const:
        return (
            ". config.json has attention_type 'cosformer', and weights with norm_const are those of"
            " 'cottention'"
        )
    return (
        ". Weights without norm_const are not Cottention's: a BERT with softmax cannot be served,"
        " and for cosFormer config.json needs"
        ' "attention_type": "cosformer"'
    )

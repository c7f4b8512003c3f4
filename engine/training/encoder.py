"""Training of bidirectional encoders: their differentiable forward pass, and masked tokens.

The modules are those of the served definition (`models/bert/model.py`); attention is computed for a
batch at once. Softmax and the linear transformer, which no served encoder has, are for comparison.

Letters: B texts, T places of a text, N = B·T, H heads, D head width, C channels.
"""

import torch
from torch import Tensor, nn

from cottention.engine import ops
from cottention.engine.models.bert.attention import FEATURE_MAPS
from cottention.engine.models.bert.config import BertConfig
from cottention.engine.models.bert.model import BertForPreTraining, SelfAttention
from cottention.engine.ops import reference
from cottention.engine.training.forward import INITIAL_STD

ENCODER_KINDS = ("softmax", "cottention", "cosformer", "linear")

MASKED = 0.15
REPLACED, RANDOM = 0.8, 0.1
"""Of the tokens that are to be predicted: become the mask token, and a random token."""


def new_encoder(config: BertConfig) -> BertForPreTraining:
    """An encoder with random weights, and the decoder tied to the word embeddings.

    Matrices and embeddings are normal with a standard deviation of 0.02, biases zero, m 0.5. For
    softmax and linear, a configuration with cosFormer has the right weights: none of its own.
    """
    model = BertForPreTraining(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(weight)
        elif weight.ndim == 2:
            nn.init.normal_(weight, std=INITIAL_STD)
    predictions = model.cls.predictions
    assert predictions is not None
    predictions.decoder.weight = model.bert.embeddings.word_embeddings.weight
    return model


def hidden_states(
    model: BertForPreTraining, kind: str, ids: Tensor, mask: Tensor, *, dtype: torch.dtype
) -> Tensor:
    """Last hidden states [B, T, C] of ids int64 [B, T] where mask, bool [B, T], is true.

    kind: one of `ENCODER_KINDS`. Matrix products are computed in `dtype`.
    """
    with torch.autocast(ids.device.type, dtype=dtype, enabled=dtype.itemsize < 4):
        x: Tensor = model.bert.embeddings(ids, torch.zeros_like(ids))
        for layer in model.layers():
            attention = layer.attention
            mixed = _attention(attention.self, model.config, kind, x, mask, dtype)
            x = attention.output(mixed, x)
            x = layer.output(ops.gelu_erf(layer.intermediate.dense(x)), x)
    return x


def _attention(
    attention: SelfAttention,
    config: BertConfig,
    kind: str,
    x: Tensor,
    mask: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """x [B, T, C] → [B, T, C]; places without a token get no weight."""
    wide = torch.promote_types(x.dtype, torch.float32)
    split = x.shape[0], x.shape[1], config.num_attention_heads, config.head_dim
    projections = attention.query, attention.key, attention.value
    q, k, v = (each(x).view(split).to(wide) for each in projections)
    if kind == "softmax":
        q, k, v = (each.transpose(1, 2).to(dtype) for each in (q, k, v))
        bias = mask[:, None, None, :]
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return out.transpose(1, 2).flatten(-2)
    is_token = mask[..., None, None]
    q, k, v = (each * is_token for each in (q, k, v))
    if kind == "linear":
        q, k = ops.elu_plus_one(q), ops.elu_plus_one(k) * is_token
    else:
        q, k, v = _mapped(attention, config, q, k, v, mask)
    q, k, v = (each.transpose(1, 2).to(dtype) for each in (q, k, v))
    out = reference.bidirectional(q, k, v, denominator=kind != "cottention")
    return out.transpose(1, 2).flatten(-2)


def _mapped(
    attention: SelfAttention, config: BertConfig, q: Tensor, k: Tensor, v: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, T, H, D] by the feature map of the configuration's kind."""
    feature_map = FEATURE_MAPS[config.attention_type](config)
    shape = mask.shape
    positions = torch.arange(shape[1], device=mask.device).repeat(shape[0])
    lengths = mask.sum(-1).clamp_min(1).repeat_interleave(shape[1])
    q, k, v = (each.flatten(0, 1) for each in (q, k, v))
    k, v = feature_map.keys_values(k, v, positions, lengths, attention.sigma())
    q = feature_map.queries(q, positions)
    q, k, v = (each.unflatten(0, shape) for each in (q, k, v))
    return q, k, v


def mask_tokens(
    ids: Tensor, mask_id: int, num_ids: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What the encoder is shown, int64 [B, T], and which tokens it has to predict, bool [B, T].

    15 % of the tokens are to be predicted. Of these, 80 % are replaced by `mask_id`, 10 % by a
    random id below `num_ids`, and 10 % stay.
    """
    is_chosen = torch.rand(ids.shape, generator=generator) < MASKED
    how = torch.rand(ids.shape, generator=generator)
    random = torch.randint(num_ids, ids.shape, generator=generator)
    shown = torch.where(is_chosen & (how < REPLACED), mask_id, ids)
    is_random = is_chosen & (how >= REPLACED) & (how < REPLACED + RANDOM)
    return torch.where(is_random, random, shown), is_chosen


def masked_loss(
    model: BertForPreTraining,
    kind: str,
    shown: Tensor,
    ids: Tensor,
    is_chosen: Tensor,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Mean of −ln p of the chosen tokens of ids [B, T]; all places have a token."""
    predictions = model.cls.predictions
    assert predictions is not None
    hidden = hidden_states(model, kind, shown, torch.ones_like(is_chosen), dtype=dtype)
    with torch.autocast(ids.device.type, dtype=dtype, enabled=dtype.itemsize < 4):
        logits = predictions(hidden[is_chosen])
    return nn.functional.cross_entropy(logits.float(), ids[is_chosen])

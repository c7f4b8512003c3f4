"""The differentiable forward pass of training: weight initialisation, loss and dropout.

Windows start from a zero state; attention is the chunked recurrence, or softmax.
"""

import functools
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from cottention.engine.models.checkpoint import load_model
from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.gptj.model import Attend, CottentionForCausalLM, map_weight
from cottention.engine.models.recurrence import Features
from cottention.engine.ops.varlen import chunked, chunked_with_decay
from cottention.engine.training.data import IGNORE_INDEX, Windows

INITIAL_STD = 0.02


def init_weights(model: CottentionForCausalLM) -> CottentionForCausalLM:
    """Initialise in place and return the model.

    Matrices are normal with a standard deviation of 0.02, smaller before a residual addition (0.02
    / √(2 n_layer)); biases are zero. Weights of a feature map stay as it has made them.
    """
    residual = INITIAL_STD / (2 * model.config.n_layer) ** 0.5
    for name, weight in model.named_parameters():
        if map_weight(name) is not None:
            continue
        if name.endswith("bias"):
            nn.init.zeros_(weight)
        elif weight.ndim == 2:
            ends_branch = "out_proj" in name or "fc_out" in name
            nn.init.normal_(weight, std=residual if ends_branch else INITIAL_STD)
    return model


def attend_from_zero(config: GPTJConfig, dtype: torch.dtype) -> Attend:
    """Attention over whole windows from a zero state, with matrix products in `dtype`.

    Softmax, or the chunked form of a recurrent kind, whose running state is float32.
    """
    if config.attention_type == "softmax":
        return functools.partial(_attend_softmax, dtype)
    has_denominator = config.feature_map.has_denominator

    def attend(_layer: int, features: Features) -> Tensor:
        q, k, v = (x.transpose(1, 2).to(dtype) for x in features[:3])
        state = features.v.new_zeros((*v.shape[:2], v.shape[-1], k.shape[-1]))
        if features.w is not None:
            w = features.w.transpose(1, 2)
            return chunked_with_decay(q, k, v, w, state)[0].transpose(1, 2)
        z = state.new_zeros((*v.shape[:2], k.shape[-1])) if has_denominator else None
        return chunked(q, k, v, state, z)[0].transpose(1, 2)

    return attend


def _attend_softmax(dtype: torch.dtype, _layer: int, features: Features) -> Tensor:
    """Causal softmax attention, scaled by 1/√d, as in GPT-J."""
    q, k, v = (x.transpose(1, 2).to(dtype) for x in features[:3])
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def logits_of(model: CottentionForCausalLM, inputs: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Logits float32 [B, T, vocabulary] of ids int64 [B, T]; matrix products in `dtype`."""
    positions = torch.arange(inputs.shape[1], device=inputs.device)
    with _autocast(inputs.device, dtype):
        logits = model(inputs, positions, attend_from_zero(model.config, dtype))
    wide: Tensor = logits.float()
    return wide


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """−ln p of each target, float32 [B, T]; 0 for IGNORE_INDEX."""
    flat = nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return flat.view(targets.shape)


def mean_loss(model: CottentionForCausalLM, windows: Windows, *, dtype: torch.dtype) -> Tensor:
    """Mean of −ln p over a batch; differentiable."""
    logits = logits_of(model, windows.inputs, dtype=dtype)
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows.targets.flatten())


def add_dropout(model: CottentionForCausalLM, probability: float) -> None:
    """Add dropout, in training mode, after the embedding and after every layer norm."""
    if probability == 0:
        return
    for module in _modules_with_dropout(model):
        module.register_forward_hook(
            lambda owner, _, out: nn.functional.dropout(out, probability, owner.training)
        )


def _modules_with_dropout(model: CottentionForCausalLM) -> list[nn.Module]:
    norms = [block.get_submodule("ln_1") for block in model.transformer.h]
    return [model.transformer.wte, *norms, model.transformer.ln_f]


def _autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype.itemsize < 4)


def initial_model(config: GPTJConfig, begin_with: Path | None) -> CottentionForCausalLM:
    """A model with fresh weights, or with those of a folder of the same shape.

    Raises ModelFolderError.
    """
    if begin_with is None:
        return init_weights(CottentionForCausalLM(config))
    model = load_model(begin_with, config, torch.float32).requires_grad_()
    assert isinstance(model, CottentionForCausalLM)
    return model

"""Fake (meta) implementations of the compiled ops: shapes and types of their outputs.

`torch.compile` and `torch.library.opcheck` use them.
"""
# ruff: noqa: ARG001 - a fake takes all arguments of its op and looks at few

from collections.abc import Callable

import torch
from torch import Tensor

from cottention.engine.ops.reference import GROUP

PANEL = 64  # output columns side by side in a packed weight, as in csrc/kernels.h
WORD_BYTES = 4


def recurrent_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    z: Tensor | None,
    state_indices: Tensor,
    cu_seqlens: Tensor | None = None,
    w: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    return v.new_empty(v.shape)


def recurrent_pieces(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    z: Tensor | None,
    pieces: Tensor,
    num_cut: int,
) -> Tensor:
    return v.new_empty(v.shape)


def pack_weight(weight: Tensor) -> Tensor:
    columns, channels = weight.shape
    per_word = WORD_BYTES // weight.element_size()
    words = (channels + per_word - 1) // per_word
    return weight.new_empty((columns + PANEL - 1) // PANEL, words, PANEL * per_word)


def compress_weight(packed: Tensor) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size()
    return packed.new_empty(packed.shape[0], size, dtype=torch.uint8)


def quantize_weight(weight: Tensor) -> Tensor:
    columns, channels = weight.shape
    words = (channels + GROUP - 1) // GROUP * (1 + GROUP // WORD_BYTES)
    panels = (columns + PANEL - 1) // PANEL
    return weight.new_empty(panels, words, PANEL * WORD_BYTES, dtype=torch.int8)


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


def rotary_table(positions: Tensor, rotary_dim: int, base: float) -> tuple[Tensor, Tensor]:
    cos = positions.new_empty(positions.shape[0], rotary_dim // 2, dtype=torch.float32)
    return cos, torch.empty_like(cos)


def cottention_features(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, sigma: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def elementwise(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, groups: int) -> Tensor:
    return x.new_empty(x.shape)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    log_decay: Tensor,
    k: Tensor,
    q: Tensor,
    state: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    return u.new_empty(u.shape)


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tails: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape)


def argmax(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def sample(logits: Tensor, argmax: Tensor, sampling_rows: Tensor) -> Tensor:
    return argmax.new_empty(argmax.shape)


def in_place(*arguments: object) -> None:
    """For ops that return nothing."""


FAKES: dict[str, Callable[..., object]] = {
    "recurrent_step": recurrent_step,
    "recurrent_pieces": recurrent_pieces,
    "zero_large_pages": in_place,
    "pack_weight": pack_weight,
    "compress_weight": compress_weight,
    "quantize_weight": quantize_weight,
    "linear": linear,
    "rotary_table": rotary_table,
    "cottention_features": cottention_features,
    "gelu_new": elementwise,
    "gelu_erf": elementwise,
    "elu_plus_one": elementwise,
    "silu": elementwise,
    "sigmoid": elementwise,
    "softplus": elementwise,
    "tanh": elementwise,
    "exp": elementwise,
    "rms_norm": rms_norm,
    "selective_scan": selective_scan,
    "short_convolution": short_convolution,
    "argmax": argmax,
    "sample": sample,
    "apply_token_bitmask": in_place,
    "linear_out": in_place,
    "linear_add": in_place,
    "layer_norm": in_place,
    "cottention_attention_gelu": in_place,
    "cottention_pieces_gelu": in_place,
    "cottention_delayed_gelu": in_place,
    "map_gelu": in_place,
    "divide_outputs": in_place,
    "fold_updates": in_place,
    "add_layer_norm": in_place,
    "cottention_layers": in_place,
    "mamba2_layers": in_place,
    "rwkv7_layers": in_place,
}

"""The ops that do the work of several in one call. Compiled only; they know no model.

Letters: R rows, N tokens, C channels, H heads, D head width, L layers, S slots, B segments.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cottention.engine.ops import loader
from cottention.engine.ops.checks import kernel_has_width
from cottention.engine.ops.loader import backend


def cottention_mix(
    joined: Tensor,
    positions: Tensor,
    sigma: Tensor,
    cos: Tensor,
    sin: Tensor,
    state: Tensor,
    slots: Tensor,
    offsets: Tensor | None,
    out: Tensor,
) -> None:
    """`cottention_features`, `recurrent_step` and `gelu_new` in one pass, bit for bit.

    joined [N, 3C + inner] is q, k, v and the MLP's input side by side, out [N, C + inner] gets the
    attention's output and the gelu; both float32 and contiguous. The rest as in those ops, without
    a denominator; heads of a width that the kernel takes. Compiled only. On CUDA joined and out may
    also be bfloat16 or float16, and it is as close to those ops as they are to the reference.
    """
    torch.ops.cottention.cottention_mix(
        joined, positions, sigma, cos, sin, state, slots, offsets, out
    )


def can_mix(device: str, width: int) -> bool:
    """Whether `cottention_mix` takes heads of this width on a device other than the CPU."""
    return device != "cpu" and kernel_has_width(width, width) and loader.is_cuda_ready()


def cottention_layers(
    x: Tensor,
    weights: Sequence[Tensor],
    epsilon: float,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    state: Tensor,
    slots: Tensor,
    offsets: Tensor | None,
    normed: Tensor,
    joined: Tensor,
    mixed: Tensor,
) -> None:
    """All blocks of a packed model on x float32 [N, C], in place: norm, product, mixer, product.

    weights: for each block the norm's weight and bias [C], the packed weight and bias [3C + inner]
    of the first product, sigma float64 [H], the packed weight and bias [C] of the second. state
    [S, L, H, D, D], its rows changed in place; normed [N, C], joined [N, 3C + inner] and mixed
    [N, C + inner] are overwritten; the rest as in `cottention_mix`, which it equals bit for bit.
    """
    torch.ops.cottention.cottention_layers(
        x, weights, epsilon, positions, cos, sin, state, slots, offsets, normed, joined, mixed
    )


def draw(logits: Tensor, likeliest: Tensor, wishes: Tensor) -> Tensor:
    """An id by chance for each row of logits float32 [R, vocabulary], on the CPU: int64 [R].

    likeliest int64 [R]; wishes float64 [R, 5] is a number in [0, 1), temperature, min_p, top_k and
    top_p. A row of temperature 0 gets its likeliest, and so does one whose likeliest is negative.
    """
    out: Tensor = torch.ops.cottention.draw(logits, likeliest, wishes)
    return out


def can_draw(logits: Tensor) -> bool:
    """Whether `draw` takes these."""
    is_single = logits.dtype == torch.float32 and logits.device.type == "cpu"
    return is_single and backend() == "compiled"

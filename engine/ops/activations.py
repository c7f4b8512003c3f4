"""Activations, norm and convolution of the recurrent families, in any implementation.

In float32 on the CPU the compiled ops run, and the bits of a row do not depend on the other rows:
torch's own exponential may differ in the last bit with an element's place. Other types and devices
run the torch reference.

Letters: N tokens, C channels, W width of the convolution, S slots, K state size.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from cottention.engine.ops import checks, reference
from cottention.engine.ops.linear import FixedOrderLinear
from cottention.engine.ops.loader import compiled_takes, cuda_takes, needs_gradient


def silu(x: Tensor) -> Tensor:
    """x σ(x), elementwise, x of any shape."""
    return _each(x, "silu", reference.silu)


def sigmoid(x: Tensor) -> Tensor:
    """σ(x) = 1 / (1 + e⁻ˣ), elementwise, x of any shape."""
    return _each(x, "sigmoid", torch.sigmoid)


def softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ), elementwise, x of any shape."""
    return _each(x, "softplus", reference.softplus)


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent, elementwise, x of any shape."""
    return _each(x, "tanh", torch.tanh)


def exp(x: Tensor) -> Tensor:
    """eˣ, elementwise, x of any shape; in the compiled op at least e⁻⁸⁷."""
    return _each(x, "exp", torch.exp)


def sin(x: Tensor) -> Tensor:
    """The sine, elementwise, x of any shape."""
    return _rounded_once(x, torch.sin)


def cos(x: Tensor) -> Tensor:
    """The cosine, elementwise, x of any shape."""
    return _rounded_once(x, torch.cos)


def _each(x: Tensor, name: str, plain: Callable[[Tensor], Tensor]) -> Tensor:
    if not compiled_takes(x):
        return _rounded_once(x, plain)
    op = getattr(torch.ops.cottention, name)
    out: Tensor = op(x if x.dim() == 2 else x.flatten(1) if x.dim() > 2 else x.unsqueeze(0))
    return out.view(x.shape)


def _rounded_once(x: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
    """In float32 on the CPU by way of float64, unless gradients are needed.

    The last bits of torch's functions depend on an element's place; of float64 they are rounded
    away.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu" or needs_gradient(x):
        return plain(x)
    return plain(x.double()).float()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, groups: int = 1) -> Tensor:
    """weight · x / √(mean(x²) + ε), the mean over each of `groups` equal parts of a row.

    x [N, C], weight [C] → [N, C] (the reference also takes more leading dimensions).
    """
    if x.dim() == 2 and compiled_takes(x, weight):
        checks.check_one_device(x, weight)
        out: Tensor = torch.ops.cottention.rms_norm(x, weight, epsilon, groups)
        return out
    return reference.rms_norm(x, weight, epsilon, groups)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """weight · (x − mean) / √(variance + ε) + bias along rows: x [N, C] → [N, C].

    weight, bias [C].
    """
    if compiled_takes(x, weight, bias):
        checks.check_one_device(x, weight, bias)
        out = torch.empty_like(x)
        torch.ops.cottention.layer_norm(x, weight, bias, epsilon, out)
        return out
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, epsilon)


def add_layer_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    dtype: torch.dtype,
) -> Tensor:
    """x ← x + y in place, then the layer norm of x as `layer_norm` in `dtype`: [N, C].

    x float32 [N, C]; y [N, C] of any floating-point type, or None: nothing is added; weight and
    bias float32 [C]. One kernel on CUDA.
    """
    if cuda_takes(x):
        out = torch.empty_like(x, dtype=dtype)
        torch.ops.cottention.add_layer_norm(x, y, weight, bias, epsilon, out)
        return out
    if y is not None:
        x.add_(y)
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, epsilon).to(dtype)


def row_sums(x: Tensor) -> Tensor:
    """Sum of each row: x [..., C] → [...]."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and not needs_gradient(x):
        out: Tensor = _ones(x.shape[-1])(x.reshape(-1, x.shape[-1]))
        return out.view(x.shape[:-1])
    return x.sum(-1)


@functools.cache
def _ones(width: int) -> FixedOrderLinear:
    """A product whose one output is the sum of a row, in an order that other rows do not change."""
    return FixedOrderLinear(torch.ones(1, width))


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tails: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """y_t = Σ_j weight_j ∘ x_{t−W+1+j} + bias, causal and depthwise; rows of tails are updated.

    x [N, C], rows any distance apart; weight [W, C], its last row is the current token's; bias [C]
    or None; tails [S, W − 1, C]: the inputs before, the oldest first, zeros at the start.
    state_indices and cu_seqlens as in `recurrent_step`. The sum begins with the bias and goes from
    the oldest input to the current one, so that a prompt may be cut anywhere. Returns [N, C].
    """
    arguments = x, weight, bias, tails, state_indices, cu_seqlens
    if compiled_takes(x, weight, bias, tails):
        checks.check_one_device(*arguments)
        out: Tensor = torch.ops.cottention.short_convolution(*arguments)
        return out
    return reference.short_convolution(*arguments)


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
    """S_cn ← exp(Δ_c A_cn) S_cn + Δ_c u_c k_n, out_c = Σ_n S_cn q_n (alg. 2, arXiv 2312.00752).

    u, delta [N, C]; log_decay, A [C, K], negative; k, q [N, K], the paper's B and C; state
    [S, C, K], whose rows are updated; state_indices and cu_seqlens as in `recurrent_step`. Outputs
    of padding are zero. Returns [N, C]. In the compiled op a decay is at least e⁻⁸⁷.
    """
    arguments = u, delta, log_decay, k, q, state, state_indices, cu_seqlens
    if compiled_takes(u, delta, log_decay, k, q, state):
        checks.check_one_device(*arguments)
        out: Tensor = torch.ops.cottention.selective_scan(*arguments)
        return out
    return reference.selective_scan(*arguments)

"""The recurrence and its neighbouring ops, and the choice between their implementations.

Compiled ops take float32 tensors on the CPU, where the bits of a row depend on that row alone; the
recurrence also takes bfloat16 and float16, and has a kernel for CUDA. Everything else runs the
torch reference: other types, widths without a kernel (logged once), and tensors that need
gradients.

Letters: B segments, N tokens, R rows, H heads, K key width, V value width, S slots, D head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cottention.engine.ops import checks, loader, reference, varlen
from cottention.engine.ops.activations import (
    add_layer_norm,
    cos,
    exp,
    layer_norm,
    rms_norm,
    row_sums,
    selective_scan,
    short_convolution,
    sigmoid,
    silu,
    sin,
    softplus,
    tanh,
)
from cottention.engine.ops.build import BuildError
from cottention.engine.ops.checks import fused_kernel_has_width, kernel_has_width
from cottention.engine.ops.fused import (
    MapKind,
    can_fuse_attention,
    can_sample,
    cottention_attention_gelu,
    cottention_delayed_gelu,
    cottention_layers,
    cottention_pieces_gelu,
    divide_outputs,
    fold_updates,
    mamba2_layers,
    map_gelu,
    rwkv7_layers,
    sample,
)
from cottention.engine.ops.linear import (
    FixedOrderLinear,
    FixedOrderNorm,
    StorageKind,
    WeightStorage,
    can_pack,
    has_wide_vectors,
    row_product,
    weight_storage,
    wide_product,
)
from cottention.engine.ops.loader import (
    Backend,
    backend,
    compiled_takes,
    cuda_takes,
    num_delayed_updates,
    warn_reference,
)
from cottention.engine.ops.reference import NO_INDEX, PADDING_SLOT, rotate, unpack_bitmask
from cottention.engine.ops.varlen import (
    PIECE_TOKENS,
    SegmentForm,
    Segments,
    check_state_indices,
)

__all__ = [
    "NO_INDEX",
    "PADDING_SLOT",
    "PIECE_TOKENS",
    "Backend",
    "BuildError",
    "FixedOrderLinear",
    "FixedOrderNorm",
    "MapKind",
    "SegmentForm",
    "Segments",
    "StorageKind",
    "WeightStorage",
    "add_layer_norm",
    "apply_token_bitmask",
    "argmax",
    "backend",
    "can_fuse_attention",
    "can_pack",
    "can_sample",
    "check_state_indices",
    "cos",
    "cottention_attention_gelu",
    "cottention_delayed_gelu",
    "cottention_features",
    "cottention_layers",
    "cottention_pieces_gelu",
    "divide_outputs",
    "elu_plus_one",
    "exp",
    "fold_updates",
    "fused_kernel_has_width",
    "gelu_erf",
    "gelu_new",
    "has_wide_vectors",
    "kernel_has_width",
    "layer_norm",
    "mamba2_layers",
    "map_gelu",
    "num_delayed_updates",
    "recurrent_segments",
    "recurrent_step",
    "rms_norm",
    "rotary_table",
    "rotate",
    "row_product",
    "row_sums",
    "rwkv7_layers",
    "sample",
    "segment_form",
    "selective_scan",
    "short_convolution",
    "sigmoid",
    "silu",
    "sin",
    "softplus",
    "tanh",
    "unpack_bitmask",
    "weight_storage",
    "wide_product",
    "zeros",
]


def zeros(shape: Sequence[int], device: str) -> Tensor:
    """float32 zeros, every page of which is written now, for memory that steps walk through.

    On the CPU they are on large pages where the system has them for those who ask: with small ones
    a step over states took half as long again where memory is fast.
    """
    x = torch.empty(tuple(shape), dtype=torch.float32, device=device)
    if not compiled_takes(x):
        return x.zero_()
    torch.ops.cottention.zero_large_pages(x)
    return x


def recurrent_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    z: Tensor | None,
    state_indices: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    w: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    """S ← S diag(w) + (S a) bᵀ + v kᵀ, out = S q for each token, in token order, in place.

    q, k [N, H, K] and v [N, H, V], of one type. state [S, H, V, K] and z [S, H, K] or None are
    float32 (float64 for float64 q); sums are accumulated in their type. state_indices int32 [B] are
    the rows of the pool, each at most once; −1 is padding, whose outputs are zero. cu_seqlens int32
    [B + 1]: segment i has the tokens cu_seqlens[i]:cu_seqlens[i + 1]; None: one token per segment.
    Returns [N, H, V] in the type of v.

    w, the decay: [N, H], one number per head, or [N, H, K]; None is 1. a and b [N, H, K], both or
    neither: without them the second term is absent. It reads the same earlier S as the first, not
    the decayed one (the delta rule of a decayed state has a = −w k). w, a and b have the type of
    the state whatever that of q; their last stride must be 1, others may be 0 (`Tensor.expand`).

    With z, the denominator: z ← w∘z + k, and out is divided by max(z·q, 1e-6): a sum below 1e-6,
    also a negative one, counts as 1e-6. Not together with a and b.

    Raises ValueError or RuntimeError before any memory is changed. On CUDA, values of state_indices
    and cu_seqlens are not checked, and rows out of range are skipped; `Segments.of` checks them.
    """
    types = checks.HALF_OR_SINGLE
    is_compiled = compiled_takes(q, k, v, w, a, b, types=types) or cuda_takes(q)
    if is_compiled and _kernel_takes(q.shape[-1], v.shape[-1]):
        checks.check_one_device(q, k, v, state, z, state_indices, cu_seqlens, w, a, b)
        step = torch.ops.cottention.recurrent_step
        out: Tensor = step(q, k, v, state, z, state_indices, cu_seqlens, w, a, b)
        return out
    checks.check_step(q, k, v, state, z, state_indices, cu_seqlens, w, a, b)
    return reference.recurrent_step(q, k, v, state, z, state_indices, cu_seqlens, w=w, a=a, b=b)


def recurrent_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    z: Tensor | None,
    segments: Segments,
    *,
    w: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    """`recurrent_step` on prepared segments; on CUDA it does not wait for the device.

    With w or a and b long segments, too, are computed token by token, by the kernel or, without
    one, by the torch reference, which then waits for the device unless all segments have one token.
    """
    slots, ends, pieces = segments.state_indices, segments.cu_seqlens, segments.pieces
    is_plain = w is None and a is None and b is None
    if is_plain and pieces is not None and cuda_takes(q):
        checks.check_one_device(q, k, v, state, z, pieces)
        step = torch.ops.cottention.recurrent_pieces
        out: Tensor = step(q, k, v, state, z, pieces, segments.num_cut)
        return out
    if is_plain and q.device.type != "cpu" and not _cuda_kernel_takes(q, v):
        checks.check_one_device(q, k, v, state, z, slots, ends)
        return varlen.advance_by_torch(q, k, v, state, z, segments)
    return recurrent_step(q, k, v, state, z, slots, ends, w=w, a=a, b=b)


def segment_form(device: str, key: int, value: int) -> SegmentForm:
    """How `Segments.of` is to prepare segments, for these key and value widths."""
    if device == "cpu":
        return "whole"
    return "pieces" if loader.is_cuda_ready() and kernel_has_width(key, value) else "chunks"


def rotary_table(
    positions: Tensor, rotary_dim: int, base: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """cos and sin of position · base^(−2i / rotary_dim), each [N, rotary_dim / 2] in `dtype`.

    positions int64 [N], counted from 0. The angles are computed in float64.
    """
    if positions.device.type == "cpu" and dtype == torch.float32 and backend() == "compiled":
        cos, sin = torch.ops.cottention.rotary_table(positions, rotary_dim, base)
        return cos, sin
    cos, sin = reference.rotary_table(positions, rotary_dim, base)
    return cos.to(dtype), sin.to(dtype)


def cottention_features(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, sigma: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cottention's feature map (arXiv 2409.18747): q′ = N(q), k′ = N(k), v′ = v / j^σ.

    N divides by the Euclidean norm after rotary embedding, j is the position counted from 1. q, k,
    v [N, H, D] (the reference also takes leading dimensions); positions int64 [N], counted from 0;
    sigma float64 [H]; cos, sin [N, rotary_dim / 2], cast to float32 if needed. Returns q′, k′, v′
    of the same shapes.
    """
    if q.dim() == 3 and compiled_takes(q, k, v, sigma):
        checks.check_one_device(q, k, v, positions, sigma, cos, sin)
        angles = cos.float(), sin.float()
        q, k, v = torch.ops.cottention.cottention_features(q, k, v, positions, sigma, *angles)
        return q, k, v
    return reference.cottention_features(q, k, v, positions, sigma, cos, sin)


def argmax(logits: Tensor) -> Tensor:
    """Index of the first largest logit of each row: int64 [R]; −1 if it is not finite.

    logits [R, N]. A row with a NaN gives −1.
    """
    if compiled_takes(logits):
        out: Tensor = torch.ops.cottention.argmax(logits)
        return out
    return reference.argmax(logits)


def apply_token_bitmask(
    logits: Tensor, rows: Sequence[int], bitmask: Tensor, places: Sequence[int]
) -> None:
    """Set to −∞ what a packed mask does not have, in rows of logits [R, N], in place.

    bitmask int32 [M, W], contiguous, on the CPU: row rows[i] keeps the ids whose bit id % 32 of
    word id / 32 of bitmask[places[i]] is set, and those from 32 W on. Raises RuntimeError or
    IndexError for rows and places that do not exist.
    """
    if compiled_takes(logits):
        chosen = torch.tensor(rows), bitmask, torch.tensor(places)
        torch.ops.cottention.apply_token_bitmask(logits, *chosen)
    else:
        reference.apply_token_bitmask(logits, rows, bitmask, places)


def gelu_new(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), elementwise. Compiled for x [N, C]."""
    if x.dim() == 2 and compiled_takes(x):
        out: Tensor = torch.ops.cottention.gelu_new(x)
        return out
    return reference.gelu_new(x)


def gelu_erf(x: Tensor) -> Tensor:
    """x Φ(x), Φ the normal distribution function, elementwise. Compiled for x [N, C]."""
    if x.dim() == 2 and compiled_takes(x):
        out: Tensor = torch.ops.cottention.gelu_erf(x)
        return out
    return reference.gelu_erf(x)


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, elementwise: x + 1 for x ≥ 0, exp(x) below. Compiled for x [N, H, D]."""
    if x.dim() == 3 and compiled_takes(x):
        out: Tensor = torch.ops.cottention.elu_plus_one(x.flatten(1))
        return out.view(x.shape)
    return reference.elu_plus_one(x)


def _cuda_kernel_takes(q: Tensor, v: Tensor) -> bool:
    return cuda_takes(q) and _kernel_takes(q.shape[-1], v.shape[-1])


def _kernel_takes(key: int, value: int) -> bool:
    if kernel_has_width(key, value):
        return True
    warn_reference(f"no kernel for key width {key} and value width {value}")
    return False

"""Random feature attention (arXiv 2103.02143), without its gate and with it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from cottention.engine.models.gptj.feature_maps.base import (
    AttentionConfig,
    FusedAttention,
    TokenPositions,
)
from cottention.engine.models.gptj.feature_maps.on_cuda import MappedAttention
from cottention.engine.models.gptj.feature_maps.random_features import (
    RandomFeatures,
    with_denominator,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

NORM_FLOOR = 1e-12


class RFA(RandomFeatures):
    """φ(x) = F^(−1/2) [sin(W x̂); cos(W x̂)] with x̂ = x / ‖x‖, F random features per head.

    (section 3.1; ‖x‖ is at least 1e-12) φ(q)·φ(k) estimates a Gaussian kernel of q̂ − k̂; there is
    no 1/√D. Rotary, which changes no length, is applied before. W [H, F, D] is a fixed Gaussian
    matrix whose columns are multiplied by the learned σ [H, D] of the head. The weights have both:
    the buffer `rfa_projection`, and σ as the parameter `rfa_sigma` [H, 1, D], at first 1.

    The sum of the scores is an estimate as well. It may be close to 0, and then the output is
    large, or negative, and then it is divided by as it is; only below 1e-6 in absolute value,
    where it has no digit left in float32, it counts as ±1e-6.
    """

    description: ClassVar[str] = (
        "causal random feature attention (arXiv 2103.02143: random Fourier features, without gate)"
    )
    weight_names: ClassVar[tuple[str, ...]] = ("rfa_projection", "rfa_sigma")
    denominator_floor: ClassVar[float] = 1e-6

    def features(
        self, q: "Tensor", k: "Tensor", v: "Tensor", at: TokenPositions, weights: Sequence["Tensor"]
    ) -> "tuple[Tensor, Tensor, Tensor]":
        import torch

        from cottention.engine import ops

        projection = weights[0].to(q.dtype)
        x = unit(ops.rotate(torch.stack([q, k]), at.cos, at.sin))
        angles = ops.row_product(x, projection)
        waves = torch.cat([ops.sin(angles), ops.cos(angles)], dim=-1)
        q, k = projection.shape[-2] ** -0.5 * waves
        return q, k, with_denominator(v)

    def default_num_features(self, head_dim: int) -> int:
        return head_dim

    def key_width(self, config: AttentionConfig) -> int:
        return 2 * self.num_features(config)

    def add_weights(self, attention: "nn.Module", config: AttentionConfig) -> None:
        """Both float32. Torch's generator is not moved on, as in `performer.orthogonal_rows`."""
        import torch
        from torch import nn

        shape = config.n_head, self.num_features(config), config.head_dim
        with torch.random.fork_rng(devices=[]):
            attention.register_buffer("rfa_projection", torch.randn(shape))
        sigma = torch.ones(config.n_head, 1, config.head_dim)
        attention.register_parameter("rfa_sigma", nn.Parameter(sigma))

    def prepared_weights(self, attention: "nn.Module") -> "tuple[Tensor, ...]":
        """W [H, F, D], with σ."""
        sigma = attention.get_parameter("rfa_sigma")
        return (attention.get_buffer("rfa_projection") * sigma,)

    @property
    def fused_attention(self) -> FusedAttention:
        return MappedAttention("fourier", self.denominator_floor)


class GatedRFA(RFA):
    """RFA that forgets: S ← g S + (1 − g) v φ(k)ᵀ and z ← g z + (1 − g) φ(k) (section 3.2).

    g = σ(w·x + b) of a head is learned, from what the layer's queries and keys are made of. The
    weights have w as `rfa_gate_weight` [H, C], at first 0, and b as `rfa_gate_bias` [H]; with that
    heads at first remember about 8 to 256 tokens.
    """

    description: ClassVar[str] = (
        "causal random feature attention (arXiv 2103.02143: random Fourier features, with gate)"
    )
    weight_names: ClassVar[tuple[str, ...]] = (
        *RFA.weight_names,
        "rfa_gate_weight",
        "rfa_gate_bias",
    )
    reads_input: ClassVar[bool] = True

    def gate(self, x: "Tensor", weights: Sequence["Tensor"]) -> "Tensor":
        from cottention.engine import ops

        _, weight, bias = (each.to(x.dtype) for each in weights)
        return ops.sigmoid(ops.row_product(x, weight) + bias)

    def add_weights(self, attention: "nn.Module", config: AttentionConfig) -> None:
        """All float32."""
        import torch
        from torch import nn

        super().add_weights(attention, config)
        width = config.n_head * config.head_dim
        forgotten = torch.logspace(-3, -8, config.n_head, base=2, device="cpu")  # 1 − g
        weight, bias = torch.zeros(config.n_head, width), (1 - forgotten).logit()
        attention.register_parameter("rfa_gate_weight", nn.Parameter(weight))
        attention.register_parameter("rfa_gate_bias", nn.Parameter(bias))

    def prepared_weights(self, attention: "nn.Module") -> "tuple[Tensor, ...]":
        """W [H, F, D], with σ; w [H, C] and b [H]."""
        own = (attention.get_parameter(name) for name in ("rfa_gate_weight", "rfa_gate_bias"))
        return (*super().prepared_weights(attention), *own)


def unit(x: "Tensor") -> "Tensor":
    """x / max(‖x‖, 1e-12) along the last dimension, with a gradient of 0 at 0."""
    from cottention.engine import ops

    return x / ops.row_sums(x * x).unsqueeze(-1).clamp_min(NORM_FLOOR**2).sqrt()

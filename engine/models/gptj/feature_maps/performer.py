"""Performer (arXiv 2009.14794): positive random features of the softmax kernel, FAVOR+."""

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

KEY_EXPONENTS = -70.0, 60.0
"""Limits of a key's exponents: within them, no denominator underflows and no sum overflows."""


class Performer(RandomFeatures):
    """φ(x)_m = M^(−1/2) exp(ω_m·x′ − ‖x′‖²/2) with x′ = x / D^(1/4), so that q′·k′ = q·k / √D.

    (lemma 1 and section 2.4) The rows ω of Ω [M, D] are orthogonal in blocks of D, with the lengths
    of Gaussian vectors; all heads of a layer share them. Rotary is applied before. Nothing is added
    to the features: the paper's code adds ε = 1e-6, which is 0 here.

    The paper's code also subtracts a maximum within exp: over all keys, which are not known while
    tokens are generated, and one per query. For keys the constant is 0 here. For queries it is the
    largest exponent of each, so that the largest feature is M^(−1/2) however long the query is; it
    cancels in the output, and with it ‖q′‖²/2.

    Keys' exponents are limited to `KEY_EXPONENTS` for the range of float32. Above they are at most
    ‖ω‖²/2, about D/2; below are those of a key with ‖k′‖ of about 12 and more.
    """

    description: ClassVar[str] = (
        "causal Performer (arXiv 2009.14794: positive random features of the softmax kernel)"
    )
    weight_names: ClassVar[tuple[str, ...]] = ("performer_projection",)
    denominator_floor: ClassVar[float] = 1e-37

    def features(
        self, q: "Tensor", k: "Tensor", v: "Tensor", at: TokenPositions, weights: Sequence["Tensor"]
    ) -> "tuple[Tensor, Tensor, Tensor]":
        import torch

        from cottention.engine import ops

        projection = weights[0].to(q.dtype)
        x = q.shape[-1] ** -0.25 * ops.rotate(torch.stack([q, k]), at.cos, at.sin)
        of_q, of_k = ops.row_product(x, projection)
        of_q = of_q - of_q.detach().amax(-1, keepdim=True)
        of_k = (of_k - ops.row_sums(x[1] * x[1]).unsqueeze(-1) / 2).clamp(*KEY_EXPONENTS)
        q, k = len(projection) ** -0.5 * ops.exp(torch.stack([of_q, of_k]))
        return q, k, with_denominator(v)

    def default_num_features(self, head_dim: int) -> int:
        return 2 * head_dim

    def key_width(self, config: AttentionConfig) -> int:
        return self.num_features(config)

    def add_weights(self, attention: "nn.Module", config: AttentionConfig) -> None:
        """Ω float32 [M, D], drawn from torch's generator as it is, without moving it on."""
        projection = orthogonal_rows(self.num_features(config), config.head_dim)
        attention.register_buffer("performer_projection", projection)

    def prepared_weights(self, attention: "nn.Module") -> "tuple[Tensor, ...]":
        return (attention.get_buffer("performer_projection"),)

    @property
    def fused_attention(self) -> FusedAttention:
        return MappedAttention("performer", self.denominator_floor)


def orthogonal_rows(num_rows: int, width: int) -> "Tensor":
    """Random rows, float32 [num_rows, width], orthogonal within each `width` of them.

    Directions are uniform, lengths those of independent Gaussian vectors. The draw begins at the
    state of torch's generator and leaves it as it was, so that models that differ in their
    attention get the same other weights from the same seed.
    """
    import torch

    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        blocks = -(-num_rows // width)
        q, r = torch.linalg.qr(torch.randn(blocks, width, width, dtype=torch.float64))
        # signs that make the directions uniform: those of qr are its own choice
        directions = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        lengths = torch.randn(num_rows, width, dtype=torch.float64).norm(dim=-1, keepdim=True)
        rows = directions.transpose(-1, -2).flatten(0, 1)[:num_rows]
        projection: Tensor = (rows * lengths).float()
    return projection

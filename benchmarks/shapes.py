"""Model shapes of the benchmarks, and models of random weights."""

import torch

from cottention.engine import ops
from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.gptj.model import CottentionForCausalLM

_PUBLISHED = {"vocab_size": 50_400, "n_layer": 20, "n_head": 16, "rotary_dim": 64}
SHAPES = {
    "default": GPTJConfig(4096, 256, 6, 4, 512, rotary_dim=64, n_inner=1024),
    "300M": GPTJConfig(n_embd=1024, n_positions=1024, n_inner=3072, **_PUBLISHED),
    "1.2B": GPTJConfig(n_embd=2048, n_positions=512, n_inner=8192, **_PUBLISHED),
}


def weight_type(kind: str) -> tuple[torch.dtype, ops.StorageKind]:
    """Of float32, bfloat16, int8, or one of the first two with "+compressed"."""
    from cottention.engine.execution.loading import DTYPES  # late: a peer's process needs no engine

    dtype, _, compressed = kind.partition("+")
    stored: ops.StorageKind = "compressed" if compressed else "packed"
    return DTYPES[dtype], "int8" if dtype == "int8" else stored


def random_model(config: GPTJConfig, dtype: torch.dtype) -> CottentionForCausalLM:
    """A model of random weights. Speed does not depend on the values unless they are denormal."""
    with torch.device("meta"):
        model = CottentionForCausalLM(config).to(dtype)
    model.to_empty(device="cpu").requires_grad_(False)
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02
    for name, weight in model.named_parameters():
        weight.copy_(
            noise.repeat(weight.numel() // len(noise) + 1)[: weight.numel()].view_as(weight)
        )
        if name.endswith(("ln_1.weight", "ln_f.weight")):
            weight.fill_(1)
    return model

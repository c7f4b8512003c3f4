"""The parallel and the recurrent form of each kind of attention are the same function."""

import pytest
import torch

from cottention.engine.models.gptj.attention import FEATURE_MAPS, token_positions
from cottention.engine.models.gptj.attention_kinds import ATTENTION_KINDS, RECURRENT_KINDS
from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.ops import recurrent_step, reference

HEADS, WIDTH = 2, 8


@pytest.mark.parametrize("length", [1, 2, 17, 65])
@pytest.mark.parametrize("attention", RECURRENT_KINDS)
def test_parallel_and_recurrent_forms_agree(attention: str, length: int) -> None:
    config = GPTJConfig(
        vocab_size=8,
        n_embd=HEADS * WIDTH,
        n_layer=1,
        n_head=HEADS,
        n_positions=length,
        rotary_dim=4,
        n_inner=8,
        attention_type=attention,
    )
    kind = ATTENTION_KINDS[attention]
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, length, HEADS, WIDTH, dtype=torch.float64, generator=generator)
    sigma = torch.rand(HEADS, dtype=torch.float64, generator=generator) * kind.has_norm_const
    at = token_positions(config, torch.arange(length), torch.float64)
    q, k, v = FEATURE_MAPS[attention](q, k, v, at, sigma)
    assert q.shape == k.shape == (length, HEADS, kind.key_width(WIDTH))

    heads_first = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]  # [1, H, T, ·]
    parallel = reference.parallel(*heads_first, denominator=kind.has_denominator)
    state = q.new_zeros(1, HEADS, WIDTH, kind.key_width(WIDTH))
    z = q.new_zeros(1, HEADS, kind.key_width(WIDTH)) if kind.has_denominator else None
    row = torch.zeros(1, dtype=torch.int32)
    steps = [
        recurrent_step(*(x[t : t + 1] for x in (q, k, v)), state, z, row) for t in range(length)
    ]
    torch.testing.assert_close(torch.cat(steps), parallel[0].transpose(0, 1), rtol=0, atol=1e-12)

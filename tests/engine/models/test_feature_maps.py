"""The parallel and the recurrent form of each kind of attention are the same function."""

import pytest
import torch

from cottention.engine.models.gptj.attention_kinds import ATTENTION_KINDS, RECURRENT_KINDS
from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.gptj.model import Attention, token_positions
from cottention.engine.ops import recurrent_step, reference

HEADS, WIDTH = 2, 8


def config_of(attention: str, length: int) -> GPTJConfig:
    return GPTJConfig(
        vocab_size=8,
        n_embd=HEADS * WIDTH,
        n_layer=1,
        n_head=HEADS,
        n_positions=length,
        rotary_dim=4,
        n_inner=8,
        attention_type=attention,
    )


@pytest.mark.parametrize("length", [1, 2, 17, 65])
@pytest.mark.parametrize("attention", RECURRENT_KINDS)
def test_parallel_and_recurrent_forms_agree(attention: str, length: int) -> None:
    config = config_of(attention, length)
    kind = config.feature_map
    key_width, value_width = kind.key_width(config), kind.value_width(config)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, length, HEADS, WIDTH, dtype=torch.float64, generator=generator)
    torch.manual_seed(length)  # of the random features, whose denominators may be near 0
    with torch.inference_mode():
        weights = Attention(config).double().map_weights()
    at = token_positions(config, torch.arange(length), torch.float64)
    q, k, v = kind.features(q, k, v, at, weights)
    x = torch.randn(length, HEADS * WIDTH, dtype=torch.float64, generator=generator)
    w = kind.gate(x, weights)
    assert q.shape == k.shape == (length, HEADS, key_width)
    assert v.shape == (length, HEADS, value_width)

    heads_first = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]  # [1, H, T, ·]
    decays = None if w is None else w.T.unsqueeze(0)
    parallel = reference.parallel(*heads_first, w=decays, denominator=kind.has_denominator)
    state = q.new_zeros(1, HEADS, value_width, key_width)
    z = q.new_zeros(1, HEADS, key_width) if kind.has_denominator else None
    row = torch.zeros(1, dtype=torch.int32)
    steps = [
        recurrent_step(
            *(x[t : t + 1] for x in (q, k, v)), state, z, row, w=None if w is None else w[t : t + 1]
        )
        for t in range(length)
    ]
    forms = [kind.outputs(out) for out in (torch.cat(steps), parallel[0].transpose(0, 1))]
    assert forms[0].shape == (length, HEADS, WIDTH)
    torch.testing.assert_close(*forms, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("attention", ATTENTION_KINDS)
def test_weight_names_are_those_of_the_added_weights(attention: str) -> None:
    """A weight under another name would be kept in the model's type and initialised as a matrix."""
    config = config_of(attention, length=8)
    own = {name for name in Attention(config).state_dict() if "_proj." not in name}
    assert own == set(config.feature_map.weight_names)

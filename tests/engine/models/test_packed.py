"""The packed layers: fused or not, equal bits; weights not kept twice; buffers that stay."""

import pytest
import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.models.gptj.attention_kinds import RECURRENT_KINDS
from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.gptj.inference import PackedLayers, ServedGPTJ
from cottention.engine.models.gptj.model import CottentionForCausalLM
from cottention.engine.models.recurrence import Features, Recurrence
from cottention.engine.ops import reference
from cottention.engine.state.pool import StatePool


def _config(head_dim: int = 16, attention: str = "cottention") -> GPTJConfig:
    return GPTJConfig(
        90, 3 * head_dim, 2, 3, 64, rotary_dim=8, n_inner=70, attention_type=attention
    )


def _model(config: GPTJConfig) -> CottentionForCausalLM:
    torch.manual_seed(0)
    return CottentionForCausalLM(config).requires_grad_(False)


def _recurrence(config: GPTJConfig, lengths: list[int]) -> Recurrence:
    pool = StatePool(config.state_spec(), len(lengths), "cpu")
    slots = torch.arange(len(lengths), dtype=torch.int32)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return Recurrence(pool.tensors, ops.Segments(slots, ends))


def _logits(served: ServedGPTJ, lengths: list[int]) -> Tensor:
    positions = torch.cat([torch.arange(n) for n in lengths])
    with torch.inference_mode():
        recurrence = _recurrence(served.config, lengths)
        return served.logits(served.hidden(positions * 7 % 90, positions, recurrence))


def _exact(config: GPTJConfig, length: int) -> Tensor:
    is_divided = "denominator" in config.state_spec().shapes

    def attend(_: int, features: Features) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in features[:3])
        w = None if features.w is None else features.w.transpose(0, 1)
        return reference.parallel(q, k, v, w=w, denominator=is_divided).transpose(0, 1)

    positions = torch.arange(length)
    with torch.inference_mode():
        out: Tensor = _model(config).double()(positions * 7 % 90, positions, attend)
    return out


@pytest.mark.parametrize("head_dim", [16, 20])
@pytest.mark.parametrize("attention", RECURRENT_KINDS)
def test_close_to_float64_with_and_without_a_kernel_for_the_width(
    attention: str, head_dim: int
) -> None:
    config = _config(head_dim, attention)
    logits = _logits(ServedGPTJ(_model(config), "cpu"), [11])
    torch.testing.assert_close(logits.double(), _exact(config, 11), rtol=1e-5, atol=1e-5)


def test_without_a_mixer_the_bits_are_the_same() -> None:
    fused, apart = (ServedGPTJ(_model(_config()), "cpu") for _ in range(2))
    assert isinstance(apart._layers, PackedLayers)
    assert apart._layers._fused is not None
    apart._layers._fused = None
    assert torch.equal(_logits(fused, [1, 9, 40]), _logits(apart, [1, 9, 40]))


def test_bfloat16_is_close_and_a_row_has_equal_bits_in_any_company() -> None:
    served = ServedGPTJ(_model(_config()).bfloat16(), "cpu")
    logits = _logits(served, [11])
    exact = _exact(_config(), 11)
    assert float((logits - exact).abs().max() / exact.std()) < 0.05
    assert torch.equal(_logits(served, [3, 11, 60])[3:14], logits)


def test_the_model_is_left_without_its_weights() -> None:
    model = _model(_config())
    ServedGPTJ(model, "cpu")
    assert sum(x.numel() for x in model.parameters()) == 2 * 48  # the last norm


def test_buffers_grow_to_the_largest_batch_and_stay() -> None:
    served = ServedGPTJ(_model(_config()), "cpu")
    assert isinstance(served._layers, PackedLayers)
    _logits(served, [5])
    _logits(served, [64])
    buffers = served._layers._buffers
    _logits(served, [7])
    assert served._layers._buffers is buffers
    assert [len(x) for x in buffers] == [64] * 3

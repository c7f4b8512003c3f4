"""The layers as CUDA runs them: beside the packed ones here, on the device where there is one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.models.checkpoint import load_model
from cottention.engine.models.gptj.inference import ServedGPTJ
from cottention.engine.models.recurrence import Recurrence
from cottention.engine.models.registry import read_config
from cottention.engine.ops import SegmentForm, Segments
from cottention.engine.state.pool import StatePool
from tests.engine.cuda_on_host import as_on_cuda

pytestmark = pytest.mark.every_feature_map

LENGTHS = {"decode": [1, 1, 1], "short": [3, 1, 2], "long": [1, 70, 5]}


def logits_and_state(
    folder: Path, device: str, lengths: list[int], form: SegmentForm
) -> tuple[Tensor, Tensor]:
    """Logits of all tokens of three segments, one of them padding, and the pool after them."""
    config = read_config(folder)
    model = ServedGPTJ(load_model(folder, config, torch.float32), device)
    pool = StatePool(config.state_spec(), 4, device)
    state = pool.tensors["state"]
    state.copy_(torch.randn(state.shape, generator=torch.Generator().manual_seed(1)))
    segments = Segments.of([2, 0, -1], lengths, 4, device, form=form)
    ids = (torch.arange(sum(lengths)) * 7 % config.vocab_size).to(device)
    positions = torch.cat([torch.arange(9, 9 + n) for n in lengths]).to(device)
    with torch.inference_mode():
        hidden = model.hidden(ids, positions, Recurrence(pool.tensors, segments))
        return model.logits(hidden).cpu(), state.cpu()


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("has_mix", [False, True])
def test_they_compute_what_the_packed_layers_do(
    gptj_folder: Path, attention: str, monkeypatch: pytest.MonkeyPatch, name: str, has_mix: bool
) -> None:
    """On the CPU, its own compiled op stands in for that of CUDA, where it has one."""
    has_mix = has_mix and attention == "cottention"
    lengths = LENGTHS[name]
    expected = logits_and_state(gptj_folder, "cpu", lengths, "whole")
    monkeypatch.setattr(ops, "can_pack", lambda _: False)
    monkeypatch.setattr(ops, "can_fuse_attention", lambda _device, _width: has_mix)
    got = logits_and_state(gptj_folder, "cpu", lengths, "whole")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LENGTHS)
def test_they_agree_with_the_ops_of_cuda_on_the_host(
    gptj_folder: Path, attention: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A gated denominator, of states that are random, may be small: a few times its rounding."""
    atol = 5e-5 if attention == "gated_rfa" else 1e-5
    expected = logits_and_state(gptj_folder, "cpu", LENGTHS[name], "whole")
    as_on_cuda(monkeypatch)
    got = logits_and_state(gptj_folder, "cpu", LENGTHS[name], "pieces")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", LENGTHS)
def test_a_gpu_agrees(gptj_folder: Path, name: str) -> None:
    expected = logits_and_state(gptj_folder, "cpu", LENGTHS[name], "whole")
    got = logits_and_state(gptj_folder, "cuda", LENGTHS[name], "pieces")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_sixteen_bits_are_those_of_products_alone(
    gptj_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes from layer to layer is float32: else its rounding outgrows that of products."""
    monkeypatch.setattr(ops, "can_pack", lambda _: False)
    monkeypatch.setattr(ops, "can_fuse_attention", lambda _device, _width: False)
    config = read_config(gptj_folder)
    model = ServedGPTJ(load_model(gptj_folder, config, torch.bfloat16), "cpu")
    pool = StatePool(config.state_spec(), 1, "cpu")
    rows = Recurrence(pool.tensors, Segments.of([0], [5], 1, "cpu"))
    with torch.inference_mode():
        hidden = model.hidden(torch.arange(5), torch.arange(5), rows)
        assert hidden.dtype == model.last_hidden(hidden).dtype == torch.float32
        assert not torch.equal(hidden, hidden.bfloat16().float())
        assert model.logits(hidden).dtype == torch.float32

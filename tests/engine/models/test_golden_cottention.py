"""The golden causal case: three forms of the model against the papers' own code."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cottention.engine.models.checkpoint import load_model
from cottention.engine.models.gptj.inference import ServedGPTJ
from cottention.engine.models.gptj.model import Attend, CottentionForCausalLM
from cottention.engine.models.recurrence import Features, Recurrence
from cottention.engine.models.registry import read_config
from cottention.engine.ops import Segments, recurrent_step, reference
from cottention.engine.ops.varlen import chunked


class Case:
    """The golden folder, read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.expected = load_file(folder / "expected.safetensors")
        self.ids = self.expected["input_ids"]
        self.batch, self.length = self.ids.shape

    def model(self, dtype: torch.dtype) -> CottentionForCausalLM:
        return load_model(self.folder, self.config, dtype)

    def state(self, dtype: torch.dtype) -> Tensor:
        """[B, L, H, V, K] of zeros."""
        return torch.zeros(self.batch, *self.config.state_spec().shapes["state"], dtype=dtype)

    def logits(self, dtype: torch.dtype, attend: Attend) -> Tensor:
        with torch.inference_mode():
            return self.model(dtype)(self.ids, torch.arange(self.length), attend)

    def error(self, logits: Tensor) -> float:
        """Largest difference to both published forms."""
        return max(
            float((logits - self.expected[name]).abs().max())
            for name in ("logits_parallel", "logits_recurrent")
        )


@pytest.fixture(scope="module")
def case(golden: Path) -> Case:
    return Case(golden / "cottention-gptj")


TOLERANCES = [(torch.float64, 1e-10), (torch.float32, 2e-5)]


def heads_first(features: Features) -> list[Tensor]:
    """[B, T, H, D] → [B, H, T, D]."""
    return [x.transpose(-3, -2) for x in features[:3]]


def attend_parallel(layer: int, features: Features) -> Tensor:
    del layer
    return reference.parallel(*heads_first(features)).transpose(-3, -2)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_golden_parallel(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    assert case.error(case.logits(dtype, attend_parallel)) <= tolerance


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 48])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_golden_chunked(case: Case, dtype: torch.dtype, tolerance: float, chunk_size: int) -> None:
    states = case.state(dtype)

    def attend(layer: int, features: Features) -> Tensor:
        out, state, _ = chunked(*heads_first(features), states[:, layer], chunk_size=chunk_size)
        states[:, layer] = state
        return out.transpose(-3, -2)

    assert case.error(case.logits(dtype, attend)) <= tolerance
    assert (states - case.expected["final_state"]).abs().max() <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_golden_recurrent(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    """One token at a time: all that is carried from step to step is the state."""
    model = case.model(dtype)
    states = case.state(dtype)
    slots = torch.arange(case.batch, dtype=torch.int32)

    def attend(layer: int, features: Features) -> Tensor:
        return recurrent_step(*features[:3], states[:, layer], None, slots)

    with torch.inference_mode():
        steps = [
            model(case.ids[:, t], torch.full((case.batch,), t), attend) for t in range(case.length)
        ]
    assert case.error(torch.stack(steps, dim=1)) <= tolerance
    assert (states - case.expected["final_state"]).abs().max() <= tolerance


def test_golden_served(case: Case) -> None:
    """The form that is served, whole prompts in one ragged step, float32."""
    model = ServedGPTJ(case.model(torch.float32), "cpu")
    states = case.state(torch.float32)
    slots = torch.arange(case.batch, dtype=torch.int32)
    offsets = torch.arange(case.batch + 1, dtype=torch.int32) * case.length
    segments = Segments(slots, offsets)
    recurrence = Recurrence({"state": states}, segments)
    with torch.inference_mode():
        positions = torch.arange(case.length).repeat(case.batch)
        logits = model.logits(model.hidden(case.ids.flatten(), positions, recurrence))
    assert case.error(logits.unflatten(0, case.ids.shape)) <= 2e-5
    assert (states - case.expected["final_state"]).abs().max() <= 2e-5


def test_golden_value_scale_is_per_value(case: Case) -> None:
    """Dividing outputs by t^σ(m) instead of values by their own j^σ(m) is another function."""
    model = case.model(torch.float64)

    def attend_wrongly(layer: int, features: Features) -> Tensor:
        position = torch.arange(1, case.length + 1, dtype=torch.float64)
        (sigma,) = model.blocks()[layer].attn.map_weights()
        scale = (position.unsqueeze(-1) ** sigma).unsqueeze(-1)
        undone = Features(features.q, features.k, features.v * scale)
        return attend_parallel(layer, undone) / scale

    with torch.inference_mode():
        logits = model(case.ids, torch.arange(case.length), attend_wrongly)
    assert case.error(logits) > 1e-3

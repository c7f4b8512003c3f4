"""The golden cosFormer layer: every form of ours against the paper's own code."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.gptj.model import Attention, token_positions
from cottention.engine.models.recurrence import Features
from cottention.engine.ops import recurrent_step, reference
from cottention.engine.ops.varlen import chunked

TOLERANCES = [(torch.float64, 1e-10), (torch.float32, 2e-5)]
Attend = Callable[[Features], Tensor]
"""q, k [B, T, H, 2D] and v [B, T, H, D] → [B, T, H, D]."""


class Case:
    """The golden folder, read once; input and outputs are [T, B, E]."""

    def __init__(self, folder: Path) -> None:
        sizes = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        width, self.length = sizes["embed_dim"], sizes["max_positions"]
        self.config = GPTJConfig(
            vocab_size=8,
            n_embd=width,
            n_layer=1,
            n_head=sizes["num_heads"],
            n_positions=self.length,
            rotary_dim=0,
            n_inner=8,
            attention_type="cosformer",
            attention_bias=True,
        )
        self.expected = load_file(folder / "expected.safetensors")

    def output(self, dtype: torch.dtype, attend: Attend) -> Tensor:
        attention = Attention(self.config).to(dtype).requires_grad_(False)
        prefix = "weight."
        weights = {
            name.removeprefix(prefix): weight
            for name, weight in self.expected.items()
            if name.startswith(prefix)
        }
        attention.load_state_dict(weights)
        x = self.expected["input"].to(dtype).transpose(0, 1)
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        q, k, v = (p(x).unflatten(-1, (self.config.n_head, -1)) for p in projections)
        at = token_positions(self.config, torch.arange(self.length), dtype)
        features = self.config.feature_map.features(q, k, v, at, attention.map_weights())
        out: Tensor = attention.out_proj(attend(Features(*features)).flatten(-2))
        return out.transpose(0, 1)


@pytest.fixture(scope="module")
def case(golden: Path) -> Case:
    return Case(golden / "cosformer-layer")


def heads_first(features: Features) -> list[Tensor]:
    """[B, T, H, D] → [B, H, T, D]."""
    return [x.transpose(1, 2) for x in features[:3]]


def attend_parallel(features: Features) -> Tensor:
    return reference.parallel(*heads_first(features), denominator=True).transpose(1, 2)


def attend_everywhere(features: Features) -> Tensor:
    return reference.bidirectional(*heads_first(features), denominator=True).transpose(1, 2)


def attend_chunked(features: Features) -> Tensor:
    q, k, v = heads_first(features)
    state = q.new_zeros(*v.shape[:2], v.shape[-1], k.shape[-1])
    z = q.new_zeros(*k.shape[:2], k.shape[-1])
    return chunked(q, k, v, state, z, chunk_size=7)[0].transpose(1, 2)


def attend_recurrent(features: Features) -> Tensor:
    """One token at a time: all that is carried is the state and its denominator."""
    q, k, v = features[:3]
    state = q.new_zeros(len(q), q.shape[2], v.shape[-1], k.shape[-1])
    z = q.new_zeros(len(q), q.shape[2], k.shape[-1])
    slots = torch.arange(len(q), dtype=torch.int32)
    steps = [recurrent_step(q[:, t], k[:, t], v[:, t], state, z, slots) for t in range(q.shape[1])]
    return torch.stack(steps, dim=1)


@pytest.mark.parametrize("attend", [attend_parallel, attend_chunked, attend_recurrent])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_golden_causal(case: Case, dtype: torch.dtype, tolerance: float, attend: Attend) -> None:
    error = case.output(dtype, attend) - case.expected["output_causal"]
    assert error.abs().max() <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_golden_bidirectional(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    error = case.output(dtype, attend_everywhere) - case.expected["output_bidirectional"]
    assert error.abs().max() <= tolerance


def test_golden_weights_are_the_cosine_of_the_distance(case: Case) -> None:
    """The 2D-wide features say what the paper's formula says of each pair of places."""

    def attend(features: Features) -> Tensor:
        q, k, v = heads_first(features)
        at = torch.arange(case.length, dtype=torch.float64)
        distance = at.unsqueeze(-1) - at
        width = v.shape[-1]
        bare = [x[..., :width].hypot(x[..., width:]) for x in (q, k)]  # ReLU(q), ReLU(k)
        scores = bare[0] @ bare[1].transpose(-1, -2)
        scores = (scores * torch.cos(torch.pi / 2 * distance / case.length)).tril()
        return (scores @ v / scores.sum(-1, keepdim=True).clamp_min(1e-6)).transpose(1, 2)

    error = case.output(torch.float64, attend) - case.expected["output_causal"]
    assert error.abs().max() <= 1e-10

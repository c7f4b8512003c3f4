"""The golden cases of the general recurrence and of a gated denominator."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cottention.engine import ops

TOLERANCES = [(torch.float64, 1e-10), (torch.float32, 2e-5)]
SPLIT = 17
SLOT = torch.tensor([1], dtype=torch.int32)
Expected = dict[str, Tensor]


@pytest.fixture(scope="module")
def general_op(golden: Path) -> Expected:
    return load_file(golden / "general-op" / "expected.safetensors")


@pytest.fixture(scope="module")
def rfa_map(golden: Path) -> Expected:
    return load_file(golden / "rfa-map" / "expected.safetensors")


def cu_seqlens(tokens: int) -> Tensor:
    return torch.tensor([0, tokens], dtype=torch.int32)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("name", ["w_none", "w_scalar", "w_key"])
@pytest.mark.parametrize("has_ab", [False, True])
def test_golden_general_op(
    general_op: Expected, name: str, has_ab: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """Six forms of decay and removal, from a state that is not zero, resumed after 17 tokens."""
    case = {key: value.to(dtype) for key, value in general_op.items()}
    terms = {"w": case.get(name), **({"a": case["a"], "b": case["b"]} if has_ab else {})}
    variant = name + "_ab" * has_ab
    state = torch.full((3, *case["initial_state"].shape), 7.0, dtype=dtype)
    state[1] = case["initial_state"]
    if variant == "w_key_ab":
        states = general_op["state.w_key_ab"][[SPLIT - 1, -1]]
    else:
        states = torch.stack([general_op[f"state_{at}.{variant}"] for at in (SPLIT, "final")])
    outs = []
    for part, expected in zip((slice(None, SPLIT), slice(SPLIT, None)), states, strict=True):
        q, k, v = (case[key][part] for key in "qkv")
        now = {key: x[part] for key, x in terms.items() if x is not None}
        outs.append(ops.recurrent_step(q, k, v, state, None, SLOT, cu_seqlens(len(q)), **now))
        assert (state[1] - expected).abs().max() <= tolerance
    assert (torch.cat(outs) - general_op[f"out.{variant}"]).abs().max() <= tolerance
    assert (state[[0, 2]] == 7).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("is_gated", [False, True])
def test_golden_rfa_denominator(
    rfa_map: Expected, is_gated: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """Random feature attention, plain and gated: the denominator decays as the state does."""
    case = {key: value[0].transpose(0, 1).to(dtype) for key, value in rfa_map.items()}
    w = case["gate"] if is_gated else None
    k = case["phi_k"] if w is None else case["phi_k"] * (1 - w).unsqueeze(-1)
    state, z = torch.zeros(3, 2, 12, 48, dtype=dtype), torch.zeros(3, 2, 48, dtype=dtype)
    if dtype == torch.float32:  # the compiled op takes widths in eights
        state = torch.zeros(3, 2, 16, 48)
    v = torch.nn.functional.pad(case["v"], (0, state.shape[2] - 12))
    prefix = "gated_" * is_gated
    outs = []
    for part, at in ((slice(None, SPLIT), SPLIT), (slice(SPLIT, None), "final")):
        q, now = case["phi_q"][part], None if w is None else w[part]
        ends = cu_seqlens(len(q))
        outs.append(ops.recurrent_step(q, k[part], v[part], state, z, SLOT, ends, w=now))
        for pool, name in ((state[1, :, :12], "state"), (z[1], "z")):
            expected = rfa_map[f"{prefix}{name}_{at}"][0]
            assert (pool - expected).abs().max() <= tolerance
    out = torch.cat(outs)[..., :12]
    expected = rfa_map[f"{prefix}output"][0].transpose(0, 1)
    assert (out - expected).abs().max() <= tolerance

"""Segments of different lengths, computed in torch as on a GPU, against float64.

Runs on the CPU, and on CUDA where there is a device.
"""

import pytest
import torch

from cottention.engine.ops import reference, varlen
from cottention.engine.ops.varlen import CHUNK_TOKENS, Segments
from tests.engine.step_cases import Case, make

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LENGTHS = [
    [1, 1, 1],
    [300],
    [1, CHUNK_TOKENS, 1, CHUNK_TOKENS + 1],
    [0, 5, 130, 0, 64, 1],
    [200, 200, 200, 3],
]


def on(case: Case, device: str, max_recurrent_tokens: int) -> tuple[Case, Segments]:
    """The case on a device, and its segments as the runner makes them."""
    assert case.cu_seqlens is not None
    lengths = case.cu_seqlens.diff().tolist()
    state_indices, size = case.state_indices.tolist(), len(case.state)
    segments = Segments.of(
        state_indices, lengths, size, device, max_recurrent_tokens=max_recurrent_tokens
    )
    return Case(*(None if x is None else x.to(device) for x in case)), segments


def assert_parity(case: Case, device: str, max_recurrent_tokens: int, tolerance: float) -> None:
    exact = case.to(torch.float64)
    expected = reference.recurrent_step(*exact)
    there, segments = on(case, device, max_recurrent_tokens)
    out = varlen.advance_by_torch(*there[:5], segments)
    scale = expected.abs().amax().clamp_min(1e-3)
    assert out.dtype == case.v.dtype
    assert ((out.cpu().double() - expected).abs() <= tolerance * scale).all()
    top = exact.state.abs().amax()
    assert ((there.state.cpu().double() - exact.state).abs() <= tolerance * top).all()
    untouched = torch.ones(len(case.state), dtype=torch.bool)
    untouched[case.state_indices[case.state_indices >= 0].long()] = False
    assert torch.equal(there.state.cpu()[untouched], case.state[untouched])
    if there.z is not None and exact.z is not None:
        torch.testing.assert_close(there.z.cpu().double(), exact.z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("denominator", [False, True])
@pytest.mark.parametrize("max_recurrent_tokens", [0, 16])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["double", "float"]
)
def test_close_to_the_recurrence(
    lengths: list[int],
    max_recurrent_tokens: int,
    denominator: bool,
    device: str,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    state_indices = [7, 0, -1, 3, 5, 2][-len(lengths) :]
    case = make(lengths, state_indices, 24, 40, denominator=denominator, pool_size=9)
    assert_parity(case.to(dtype), device, max_recurrent_tokens, tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("denominator", [False, True])
def test_nan_stays_in_its_segment(device: str, denominator: bool) -> None:
    case = make([70, 70, 1], [1, -1, 2], 16, 8, denominator=denominator)
    clean = case.to(torch.float32)
    expected = reference.recurrent_step(*clean)
    case.q[70:140], case.k[70:140], case.v[70:140] = (float("nan"),) * 3
    there, segments = on(case, device, 0)
    out = varlen.advance_by_torch(*there[:5], segments).cpu()
    assert torch.equal(out[70:140], torch.zeros_like(out[70:140]))
    torch.testing.assert_close(out[:70], expected[:70], rtol=1e-4, atol=1e-4)
    assert not there.state.isnan().any()


@pytest.mark.parametrize("slot", [-1, 12])
@pytest.mark.parametrize("device", DEVICES)
def test_indices_outside_the_pool_change_nothing(device: str, slot: int) -> None:
    case = make([1, 1], [slot, 3], denominator=True)
    nan = torch.full_like(case.k[:1], float("nan"))
    case = case._replace(k=torch.cat([nan, case.k[1:]]))
    there = Case(*(None if x is None else x.to(device) for x in case))
    out = varlen.advance_rows(*there[:5], there.state_indices).cpu()
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert not out[1].isnan().any()
    others = [i for i in range(len(case.state)) if i != 3]
    assert torch.equal(there.state.cpu()[others], case.state[others])


def test_a_segment_may_be_resumed() -> None:
    whole = make([150], [2], 16, 16, denominator=True).to(torch.float64)
    parts = whole.to(torch.float64)
    expected = varlen.advance_by_torch(
        *whole[:5], Segments.of([2], [150], 12, "cpu", max_recurrent_tokens=0)
    )
    outs = [
        varlen.advance_by_torch(
            *(x[start : start + n] for x in parts[:3]),
            parts.state,
            parts.z,
            Segments.of([2], [n], 12, "cpu", max_recurrent_tokens=0),
        )
        for start, n in ((0, 100), (100, 1), (101, 49))
    ]
    torch.testing.assert_close(torch.cat(outs), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(parts.state, whole.state, rtol=1e-11, atol=1e-11)


def test_the_kernel_computes_short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op gets −1 in place of what is cut; with it, the whole is what the reference computes."""
    case = make([1, 100, 3, 1], [4, 2, 0, -1], 16, 16, denominator=True).to(torch.float64)
    exact = case.to(torch.float64)
    expected = reference.recurrent_step(*exact)
    named = []

    def step(*arguments: torch.Tensor) -> torch.Tensor:
        named.append(arguments[5].tolist())
        return reference.recurrent_step(*arguments)

    monkeypatch.setattr(torch.ops.cottention, "recurrent_step", step, raising=False)
    there, segments = on(case, "cpu", 32)
    out = varlen.advance_by_kernel(*there[:5], segments)
    assert named == [[4, -1, 0, -1]]
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(there.state, exact.state, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("state_indices", "message"),
    [
        ([0, 9], "slot 9 is out of range for a pool of 9"),
        ([-2], "slot -2"),
        ([3, 3], "named twice"),
    ],
)
def test_state_indices_are_checked_on_the_host(state_indices: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segments.of(state_indices, [1] * len(state_indices), 9, "cpu")


def test_padding_may_be_repeated() -> None:
    segments = Segments.of([-1, 2, -1], [1, 1, 1], 9, "cpu", max_recurrent_tokens=0)
    assert segments.cu_seqlens is None
    assert segments.chunks is None
    assert segments.state_indices.tolist() == [-1, 2, -1]

"""Segments of different lengths, computed in torch as on a GPU, against float64.

Runs on the CPU, and on CUDA where there is a device.
"""

import pytest
import torch

from cottention.engine.ops import reference, varlen
from cottention.engine.ops.varlen import CHUNK_TOKENS, Segments, pieces_of
from tests.engine.step_cases import Case, make

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LENGTHS = [
    [1, 1, 1],
    [300],
    [1, CHUNK_TOKENS, 1, CHUNK_TOKENS + 1],
    [0, 5, 130, 0, 64, 1],
    [200, 200, 200, 3],
]


def on(case: Case, device: str) -> tuple[Case, Segments]:
    """The case on a device, and its segments as the runner makes them."""
    assert case.cu_seqlens is not None
    lengths = case.cu_seqlens.diff().tolist()
    state_indices, size = case.state_indices.tolist(), len(case.state)
    segments = Segments.of(state_indices, lengths, size, device, form="chunks")
    return Case(*(None if x is None else x.to(device) for x in case)), segments


def assert_parity(case: Case, device: str, tolerance: float) -> None:
    exact = case.to(torch.float64)
    expected = reference.recurrent_step(*exact)
    there, segments = on(case, device)
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
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["double", "float"]
)
def test_close_to_the_recurrence(
    lengths: list[int],
    denominator: bool,
    device: str,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    state_indices = [7, 0, -1, 3, 5, 2][-len(lengths) :]
    case = make(lengths, state_indices, 24, 40, denominator=denominator, pool_size=9)
    assert_parity(case.to(dtype), device, tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("denominator", [False, True])
def test_nan_stays_in_its_segment(device: str, denominator: bool) -> None:
    case = make([70, 70, 1], [1, -1, 2], 16, 8, denominator=denominator)
    clean = case.to(torch.float32)
    expected = reference.recurrent_step(*clean)
    case.q[70:140], case.k[70:140], case.v[70:140] = (float("nan"),) * 3
    there, segments = on(case, device)
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
        *whole[:5], Segments.of([2], [150], 12, "cpu", form="chunks")
    )
    outs = [
        varlen.advance_by_torch(
            *(x[start : start + n] for x in parts[:3]),
            parts.state,
            parts.z,
            Segments.of([2], [n], 12, "cpu", form="chunks"),
        )
        for start, n in ((0, 100), (100, 1), (101, 49))
    ]
    torch.testing.assert_close(torch.cat(outs), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(parts.state, whole.state, rtol=1e-11, atol=1e-11)


def test_pieces_cover_every_token_once_and_cut_segments_come_first() -> None:
    """What a device gets beside them in memory is for those that are cut alone."""
    pieces, num_cut = pieces_of([5, -1, 2, 7, 0], [0, 1, 10, 19, 19, 24], 4)
    assert num_cut == 5
    assert pieces[:3] == [(2, 10, 14, 0, 2), (2, 14, 18, 0, 2), (2, 18, 19, 0, 2)]
    assert pieces[3:5] == [(0, 19, 23, 3, 4), (0, 23, 24, 3, 4)]
    assert pieces[5:] == [(5, 0, 1, 5, 5), (-1, 1, 10, 6, 6), (7, 19, 19, 7, 7)]


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
    segments = Segments.of([-1, 2, -1], [1, 1, 1], 9, "cpu", form="chunks")
    assert segments.cu_seqlens is None
    assert segments.chunks is None
    assert segments.pieces is None
    assert segments.state_indices.tolist() == [-1, 2, -1]

"""recurrent_step: against float64, and in equal bits however a sequence is cut."""

from itertools import pairwise

import pytest
import torch

from cottention.engine import ops
from cottention.engine.ops import reference
from tests.engine.step_cases import Case, far_pools, make

VALUE_WIDTHS = [8, 16, 32, 48, 64, 80, 96, 128, 160, 192, 256]
KEY_WIDTHS = [8, 24, 64, 72, 128, 512]
HALVES = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Types of 16 bits, and how far the nearest of their numbers may lie, of the largest."""


def assert_parity(case: Case) -> None:
    exact = case.to(torch.float64)
    expected = reference.recurrent_step(*exact)
    untouched = torch.ones(len(case.state), dtype=torch.bool)
    untouched[case.state_indices[case.state_indices >= 0].long()] = False
    before = case.state.clone()
    out = ops.recurrent_step(*case)
    scale = expected.abs().amax().clamp_min(1e-3) if expected.numel() else torch.tensor(1.0)
    assert ((out - expected).abs() <= 2e-6 * scale).all()
    torch.testing.assert_close(case.state.double(), exact.state, rtol=1e-6, atol=1e-5)
    assert torch.equal(case.state[untouched], before[untouched])
    if case.z is not None and exact.z is not None:
        torch.testing.assert_close(case.z.double(), exact.z, rtol=1e-6, atol=1e-5)


def poison(case: Case) -> None:
    """Leave NaN in the memory that the op's output will probably get."""
    for _ in range(4):
        torch.full((case.q.shape[0], case.q.shape[1], case.v.shape[2]), float("nan"))


def test_this_machine_runs_the_compiled_ops() -> None:
    assert ops.backend() == "compiled"


@pytest.mark.parametrize("denominator", [False, True])
@pytest.mark.parametrize("value", VALUE_WIDTHS)
def test_value_widths(value: int, denominator: bool) -> None:
    case = make([1, 1, 1], [5, 0, 3], 64, value, denominator=denominator)
    poison(case)
    assert_parity(case)


@pytest.mark.parametrize("denominator", [False, True])
@pytest.mark.parametrize("key", KEY_WIDTHS)
def test_key_widths(key: int, denominator: bool) -> None:
    case = make([2, 0, 5], [1, 2, 0], key, 40, denominator=denominator)
    poison(case)
    assert_parity(case)


@pytest.mark.parametrize("tokens", [1, 3, 63])
def test_decode_on_permuted_slots_with_padding(tokens: int) -> None:
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))[:tokens]
    state_indices = order.tolist()
    state_indices[tokens // 2] = -1
    case = make([1] * tokens, state_indices, pool_size=70)._replace(cu_seqlens=None)
    poison(case)
    assert_parity(case)


def test_padding_yields_zeros_and_changes_nothing() -> None:
    case = make([3, 2], [-1, 4], denominator=True)
    before = case.to(torch.float32)
    poison(case)
    out = ops.recurrent_step(*case)
    assert torch.equal(out[:3], torch.zeros_like(out[:3]))
    assert torch.equal(case.state[:4], before.state[:4])
    assert case.z is not None
    assert before.z is not None
    assert torch.equal(case.z[:4], before.z[:4])


def test_a_row_beyond_two_to_the_31st_element() -> None:
    near, far = far_pools()
    case = make([1], [0], 512, 256, heads=16)
    expected = ops.recurrent_step(*case._replace(state=near))
    state_indices = torch.tensor([len(far) - 1], dtype=torch.int32)
    assert torch.equal(
        ops.recurrent_step(*case._replace(state=far, state_indices=state_indices)), expected
    )
    assert torch.equal(far[-1], near[0])


def test_no_tokens() -> None:
    case = make([], [])
    assert ops.recurrent_step(*case).shape == (0, 2, 64)


def test_denominator_is_clamped() -> None:
    case = make([1], [0], 8, 8, denominator=True)
    assert case.z is not None
    case.z.zero_()
    out = ops.recurrent_step(*case._replace(k=-case.k))
    expected = (case.state[:1] @ case.q.unsqueeze(-1)).squeeze(-1) / 1e-6
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1.0)


@pytest.mark.parametrize("denominator", [False, True])
@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 7], [1, 10, 1], [3, 0, 9]])
@pytest.mark.parametrize(("key", "value"), [(64, 64), (24, 40), (128, 256), (72, 8)])
def test_a_split_segment_has_equal_bits(
    key: int, value: int, cuts: list[int], denominator: bool
) -> None:
    whole = make([12], [2], key, value, denominator=denominator)
    parts = whole.to(torch.float32)
    expected = ops.recurrent_step(*whole)
    outs, start = [], 0
    for length in cuts:
        q, k, v = (x[start : start + length] for x in parts[:3])
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
        outs.append(
            ops.recurrent_step(q, k, v, parts.state, parts.z, parts.state_indices, cu_seqlens)
        )
        start += length
    assert torch.equal(torch.cat(outs), expected)
    assert torch.equal(parts.state, whole.state)


@pytest.mark.parametrize("denominator", [False, True])
def test_bits_do_not_depend_on_batch_or_threads(denominator: bool) -> None:
    lengths = [30, 1, 1, 7, 0, 2]
    together = make(lengths, [9, 0, 3, -1, 5, 6], 64, 128, denominator=denominator)
    alone, single = together.to(torch.float32), together.to(torch.float32)
    expected = ops.recurrent_step(*together)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(ops.recurrent_step(*single), expected)
    finally:
        torch.set_num_threads(threads)
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    for i, (a, b) in enumerate(pairwise(bounds)):
        q, k, v = (x[a:b] for x in alone[:3])
        cu_seqlens = torch.tensor([0, b - a], dtype=torch.int32)
        state_indices = alone.state_indices[i : i + 1]
        out = ops.recurrent_step(q, k, v, alone.state, alone.z, state_indices, cu_seqlens)
        assert torch.equal(out, expected[a:b])
    assert torch.equal(alone.state, together.state)
    assert torch.equal(single.state, together.state)


@pytest.mark.parametrize("denominator", [False, True])
@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [3, 0, 2]])
@pytest.mark.parametrize(("key", "value"), [(64, 64), (24, 40), (512, 256), (20, 12)])
@pytest.mark.parametrize("dtype", HALVES)
def test_16_bit_inputs_update_a_float32_state(
    dtype: torch.dtype, key: int, value: int, lengths: list[int], denominator: bool
) -> None:
    """What is read is rounded once, at its end; the state moves as by inputs of 32."""
    state_indices = [5, -1, 3][-len(lengths) :]
    case = make(lengths, state_indices, key, value, denominator=denominator)
    q, k, v = (x.to(dtype) for x in case[:3])
    short = case.to(torch.float32)._replace(q=q, k=k, v=v)
    wide = case.to(torch.float32)._replace(q=q.float(), k=k.float(), v=v.float())
    exact = wide.to(torch.float64)
    expected = reference.recurrent_step(*exact)
    poison(short)
    out = ops.recurrent_step(*short)
    assert torch.equal(out, ops.recurrent_step(*wide).to(dtype))
    assert ((out - expected).abs() <= HALVES[dtype] * expected.abs().amax()).all()
    assert torch.equal(short.state, wide.state)
    torch.testing.assert_close(short.state.double(), exact.state, rtol=1e-6, atol=1e-5)
    if short.z is not None and wide.z is not None:
        assert torch.equal(short.z, wide.z)


def test_16_bit_slices() -> None:
    """As the engine makes them: heads side by side in one row of a product."""
    stacked = torch.randn(5, 3 * 2 * 16 + 3).bfloat16()
    q, k, v = stacked[:, :96].view(5, 3, 2, 16).unbind(1)
    pools = torch.zeros(5, 2, 16, 16), torch.zeros(5, 2, 16, 16)
    state_indices = torch.tensor([4, 0, 2, 1, 3], dtype=torch.int32)
    out = ops.recurrent_step(q, k, v, pools[0], None, state_indices)
    whole = (x.contiguous() for x in (q, k, v))
    assert torch.equal(out, ops.recurrent_step(*whole, pools[1], None, state_indices))
    assert torch.equal(*pools)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_widths_and_types_take_the_reference(dtype: torch.dtype) -> None:
    case = make([2, 3], [1, 0], 20, 12, denominator=True)
    exact = case.to(torch.float64)
    expected = reference.recurrent_step(*exact)
    out = ops.recurrent_step(*case.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("denominator", [False, True])
def test_opcheck(denominator: bool, dtype: torch.dtype) -> None:
    case = make([2, 1], [3, -1], 16, 8, denominator=denominator)
    q, k, v = (x.to(dtype) for x in case[:3])
    case = case._replace(q=q, k=k, v=v)
    torch.library.opcheck(torch.ops.cottention.recurrent_step.default, case)

"""recurrent_step on CUDA against float64; without a GPU, its threads are emulated on the host.

Both run the checks of csrc/cuda/ops.cpp and the functions of recurrent.cuh; only shuffle, barrier
and launch differ. Outputs are allocated where NaN lies.
"""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from cottention.engine.ops import reference
from tests.engine.cuda_on_host import Place, step_on_host
from tests.engine.step_cases import (
    FORMS,
    Case,
    Terms,
    assert_pools,
    far_pools,
    make,
    terms_of,
)

VALUE_WIDTHS = [8, 16, 32, 48, 64, 80, 96, 128, 160, 192, 256]
KEY_WIDTHS = [8, 16, 24, 40, 64, 72, 128, 136, 256, 264, 512]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}

Step = Callable[..., Tensor]
"""A case, and w, a and b if there are any, to the outputs."""
NO_TERMS = Terms(None, None, None)


def on_cuda(x: Tensor) -> Tensor:
    """A copy with the strides and the offset of the original, all its storage copied."""
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).cuda()
    return whole.as_strided(x.size(), x.stride(), x.storage_offset())


def step_on_cuda(case: Case, *terms: Tensor | None) -> Tensor:
    """The op on copies on the GPU; the pools come back to where they were."""
    there = Case(*(None if x is None else on_cuda(x) for x in case))
    given = [None if x is None else on_cuda(x) for x in terms]
    poison = [torch.full(case.v.shape, float("nan"), dtype=case.v.dtype).cuda() for _ in range(4)]
    del poison
    out: Tensor = torch.ops.cottention.recurrent_step(*there, *given)
    case.state.copy_(there.state)
    if case.z is not None and there.z is not None:
        case.z.copy_(there.z)
    return out.cpu()


@pytest.fixture
def step(place: Place, poisoned: None) -> Step:  # noqa: ARG001
    return step_on_host if place.device == "cpu" else step_on_cuda


def rounded(case: Case, dtype: torch.dtype) -> Case:
    """q, k and v in `dtype`, still slices of something wider."""
    stacked = [torch.cat([x, x], dim=1).to(dtype)[:, : x.shape[1]] for x in case[:3]]
    return case._replace(q=stacked[0], k=stacked[1], v=stacked[2])


def assert_parity(step: Step, case: Case, terms: Terms = NO_TERMS) -> None:
    exact = case.to(torch.float64)
    expected = reference.recurrent_step(*exact, **terms.double())
    before = case.to(torch.float32)
    out = step(case, *terms)
    assert out.dtype == case.v.dtype
    scale = expected.abs().amax().clamp_min(1e-3) if expected.numel() else torch.tensor(1.0)
    assert ((out.double() - expected).abs() <= ROUNDING[out.dtype] * scale).all()
    assert_pools(case, before, exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("denominator", [False, True])
@pytest.mark.parametrize("value", VALUE_WIDTHS)
def test_value_widths(step: Step, value: int, denominator: bool) -> None:
    assert_parity(step, make([1, 1, 1], [5, 0, 3], 64, value, denominator=denominator))


@pytest.mark.parametrize("denominator", [False, True])
@pytest.mark.parametrize("key", KEY_WIDTHS)
def test_key_widths(step: Step, key: int, denominator: bool) -> None:
    assert_parity(step, make([2, 0, 5], [1, 2, 0], key, 40, denominator=denominator))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("key", "value"), [(64, 64), (8, 40), (72, 16), (256, 512), (512, 24)])
def test_terms(step: Step, form: str, key: int, value: int) -> None:
    case = make([1, 2, 0, 3], [5, -1, 0, 3], key, value, pool_size=7)
    assert_parity(step, case, terms_of(form, case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_terms_with_16_bit_inputs(step: Step, dtype: torch.dtype) -> None:
    case = make([1, 2, 0, 3], [5, -1, 0, 3], 64, 40, pool_size=7)
    assert_parity(step, rounded(case, dtype), terms_of("w-key ab", case))


@pytest.mark.parametrize("form", ["w-head", "w-key"])
def test_a_denominator_decays_as_the_state(step: Step, form: str) -> None:
    case = make([1, 2, 0, 3], [5, -1, 0, 3], 72, 16, denominator=True)
    assert_parity(step, case, terms_of(form, case))


@pytest.mark.parametrize("form", FORMS)
def test_a_split_segment_with_terms_has_equal_bits(step: Step, form: str) -> None:
    whole = make([12], [2], 64, 24, pool_size=4)
    terms, parts = terms_of(form, whole), whole.to(torch.float32)
    expected = step(whole, *terms)
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        q, k, v = (x[start:stop] for x in parts[:3])
        ends = None if stop - start == 1 else torch.tensor([0, stop - start], dtype=torch.int32)
        case = parts._replace(q=q, k=k, v=v, cu_seqlens=ends)
        assert torch.equal(step(case, *terms.part(start, stop).values()), expected[start:stop])
    assert torch.equal(parts.state, whole.state)


@pytest.mark.parametrize("denominator", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("key", "value"), [(64, 64), (128, 128), (24, 40), (72, 8), (512, 256)])
def test_types(step: Step, key: int, value: int, dtype: torch.dtype, denominator: bool) -> None:
    case = make([1, 3, 2], [7, -1, 4], key, value, denominator=denominator, pool_size=9)
    assert_parity(step, rounded(case, dtype))


@pytest.mark.parametrize("tokens", [1, 3, 63])
def test_decode_on_permuted_slots_with_padding(step: Step, tokens: int) -> None:
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))[:tokens]
    state_indices = order.tolist()
    state_indices[tokens // 2] = -1
    case = make([1] * tokens, state_indices, pool_size=70)._replace(cu_seqlens=None)
    assert_parity(step, case)


@pytest.mark.parametrize("slot", [-1, -7, 12, 2**31 - 1])
@pytest.mark.parametrize("denominator", [False, True])
def test_indices_out_of_range_yield_zeros(step: Step, slot: int, denominator: bool) -> None:
    case = make([3, 2], [slot, 4], denominator=denominator)
    before = case.to(torch.float32)
    out = step(case)
    assert torch.equal(out[:3], torch.zeros_like(out[:3]))
    assert not out[3:].isnan().any()
    others = [i for i in range(len(case.state)) if i != 4]
    assert torch.equal(case.state[others], before.state[others])
    if case.z is not None and before.z is not None:
        assert torch.equal(case.z[others], before.z[others])


def test_cu_seqlens_beyond_the_batch_are_clamped(step: Step) -> None:
    case = make([2, 3], [1, 0])
    wild = case._replace(cu_seqlens=torch.tensor([-4, 2, 900], dtype=torch.int32))
    expected = case.to(torch.float32)
    assert torch.equal(step(wild), step(expected))
    assert torch.equal(case.state, expected.state)


def test_no_tokens(step: Step) -> None:
    assert step(make([], [])).shape == (0, 2, 64)


def test_denominator_is_clamped(step: Step) -> None:
    case = make([1], [0], 8, 8, denominator=True)
    assert case.z is not None
    case.z.zero_()
    out = step(case._replace(k=-case.k))
    expected = (case.state[:1] @ case.q.unsqueeze(-1)).squeeze(-1) / 1e-6
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1.0)


@pytest.mark.parametrize("denominator", [False, True])
@pytest.mark.parametrize(("key", "value"), [(64, 64), (24, 40), (128, 256), (264, 8)])
def test_a_split_segment_has_equal_bits(
    step: Step, key: int, value: int, denominator: bool
) -> None:
    whole = make([12, 1], [2, 3], key, value, denominator=denominator)
    parts = whole.to(torch.float32)
    expected = step(whole)
    for start, stop in pairwise([0, 5, 5, 6, 12, 13]):
        q, k, v = (x[start:stop] for x in parts[:3])
        state_indices = parts.state_indices[: 1 if stop <= 12 else 2][-1:]
        cu_seqlens = (
            None if stop - start == 1 else torch.tensor([0, stop - start], dtype=torch.int32)
        )
        out = step(Case(q, k, v, parts.state, parts.z, state_indices, cu_seqlens))
        assert torch.equal(out, expected[start:stop])
    assert torch.equal(parts.state, whole.state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key", [48, 136, 264])
def test_a_query_at_any_address(step: Step, key: int, dtype: torch.dtype) -> None:
    """Reading four elements at once and one at a time gives equal bits."""
    even = rounded(make([1, 4], [3, 1], key, 16), dtype)
    stacked = torch.cat([*(x.flatten(1) for x in even[:3]), torch.zeros(5, 3).to(dtype)], dim=1)
    parts = stacked[:, :-3].split([2 * key, 2 * key, 32], dim=1)
    odd = Case(*(x.unflatten(1, (2, -1)) for x in parts), even.state.clone(), *even[4:])
    assert odd.q.stride(0) % 4
    assert torch.equal(step(odd), step(even))
    assert torch.equal(odd.state, even.state)


@pytest.mark.slow  # it takes 8 GB
def test_a_row_beyond_two_to_the_31st_element() -> None:
    """On the host; on a GPU, see test_on_gpu.py."""
    near, far = far_pools()
    case = make([1], [0], 512, 256, heads=16)
    expected = step_on_host(case._replace(state=near))
    state_indices = torch.tensor([len(far) - 1], dtype=torch.int32)
    assert torch.equal(
        step_on_host(case._replace(state=far, state_indices=state_indices)), expected
    )
    assert torch.equal(far[-1], near[0])

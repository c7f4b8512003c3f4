"""recurrent_step: against float64, in equal bits however a sequence is cut, and what it refuses."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from engine import ops
from engine.ops import reference

VALUE_WIDTHS = [8, 16, 32, 48, 64, 80, 96, 128, 160, 192, 256]
KEY_WIDTHS = [8, 24, 64, 72, 128, 512]


class Case(NamedTuple):
    """Arguments of the op, in its order."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: Tensor
    z: Tensor | None
    slots: Tensor
    offsets: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Case":
        """Copies, floats in `dtype`."""
        kinds = [x if x is None or not x.is_floating_point() else x.to(dtype) for x in self]
        return Case(*(None if x is None else x.clone() for x in kinds))


def make(
    lengths: list[int],
    slots: list[int],
    key: int = 64,
    value: int = 64,
    heads: int = 2,
    *,
    denominator: bool = False,
    pool_size: int = 70,
) -> Case:
    """Segments of the given lengths as slices of one stacked projection, on a pool that is full."""
    generator = torch.Generator().manual_seed(key * 1000 + value + len(lengths))
    tokens = sum(lengths)
    stacked = torch.rand(tokens, heads * (2 * key + value) + 5, generator=generator)
    q = stacked[:, : heads * key].view(tokens, heads, key)
    k = stacked[:, heads * key : 2 * heads * key].view(tokens, heads, key)
    v = stacked[:, 2 * heads * key : -5].view(tokens, heads, value) - 0.5
    pool = torch.randn(pool_size, 3, heads, value, key, generator=generator)
    z = torch.rand(pool_size, 3, heads, key, generator=generator)[:, 1] if denominator else None
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    offsets = torch.tensor(ends, dtype=torch.int32)
    return Case(q, k, v, pool[:, 1], z, torch.tensor(slots, dtype=torch.int32), offsets)


def assert_parity(case: Case) -> None:
    exact = case.to(torch.float64)
    expected = reference.recurrent_step(*exact)
    untouched = torch.ones(len(case.state), dtype=torch.bool)
    untouched[case.slots[case.slots >= 0].long()] = False
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
    slots = order.tolist()
    slots[tokens // 2] = -1
    case = make([1] * tokens, slots)._replace(offsets=None)
    poison(case)
    assert_parity(case)


def test_padding_yields_zeros_and_moves_nothing() -> None:
    case = make([3, 2], [-1, 4], denominator=True)
    before = case.to(torch.float32)
    poison(case)
    out = ops.recurrent_step(*case)
    assert torch.equal(out[:3], torch.zeros_like(out[:3]))
    assert torch.equal(case.state[:4], before.state[:4])
    assert case.z is not None
    assert before.z is not None
    assert torch.equal(case.z[:4], before.z[:4])


def test_no_tokens() -> None:
    case = make([], [])
    assert ops.recurrent_step(*case).shape == (0, 2, 64)


def test_denominator_is_held_above_its_floor() -> None:
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
        offsets = torch.tensor([0, length], dtype=torch.int32)
        outs.append(ops.recurrent_step(q, k, v, parts.state, parts.z, parts.slots, offsets))
        start += length
    assert torch.equal(torch.cat(outs), expected)
    assert torch.equal(parts.state, whole.state)


@pytest.mark.parametrize("denominator", [False, True])
def test_company_and_threads_change_no_bit(denominator: bool) -> None:
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
        offsets = torch.tensor([0, b - a], dtype=torch.int32)
        slots = alone.slots[i : i + 1]
        out = ops.recurrent_step(q, k, v, alone.state, alone.z, slots, offsets)
        assert torch.equal(out, expected[a:b])
    assert torch.equal(alone.state, together.state)
    assert torch.equal(single.state, together.state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_widths_and_types_take_the_reference(dtype: torch.dtype) -> None:
    case = make([2, 3], [1, 0], 20, 12, denominator=True)
    exact = case.to(torch.float64)
    expected = reference.recurrent_step(*exact)
    out = ops.recurrent_step(*case.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("denominator", [False, True])
def test_opcheck(denominator: bool) -> None:
    case = make([2, 1], [3, -1], 16, 8, denominator=denominator)
    torch.library.opcheck(torch.ops.cottention.recurrent_step.default, case)


def _int(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


WRONG = {
    "out of range": lambda c: c._replace(slots=_int(70, 1)),
    "named twice": lambda c: c._replace(slots=_int(1, 1)),
    r"must (rise|run)": lambda c: c._replace(offsets=_int(0, 2, 4)),
    r"must (rise|not fall)": lambda c: c._replace(offsets=_int(0, 6, 5)),
    "one slot per token": lambda c: c._replace(offsets=None),
    "offsets": lambda c: c._replace(offsets=_int(0, 5)),
    "slots": lambda c: c._replace(slots=c.slots.long()),
    r"\bk\b": lambda c: c._replace(k=c.k[:, :1]),
    r"\bv\b": lambda c: c._replace(v=c.v[:3]),
    "state": lambda c: c._replace(state=c.state[..., :8]),
    r"\bz\b": lambda c: c._replace(z=c.state[:, :, 0, :8]),
    "dimensions|shape": lambda c: c._replace(v=c.v.flatten(1)),
    "one device": lambda c: c._replace(state=c.state.to("meta")),
}


@pytest.mark.parametrize("width", [16, 12])
@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused_before_memory_is_touched(message: str, width: int) -> None:
    case = make([2, 3], [1, 0], width, width, denominator=True)
    before = case.state.clone()
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.recurrent_step(*WRONG[message](case))
    assert torch.equal(case.state, before)


@pytest.mark.parametrize(
    ("message", "name"),
    [("dtype", "state"), ("contiguous", "q"), ("contiguous behind", "state"), ("overlap", "state")],
)
def test_the_kernel_refuses_layouts_it_would_misread(message: str, name: str) -> None:
    case = make([2, 3], [1, 0], 16, 16)
    wrong = {
        "dtype": case.state.double(),
        "contiguous": case.q.transpose(1, 2).contiguous().transpose(1, 2),
        "contiguous behind": case.state.transpose(2, 3),
        "overlap": case.state[:1].expand_as(case.state),
    }[message]
    with pytest.raises(RuntimeError, match=message):
        ops.recurrent_step(*case._replace(**{name: wrong}))

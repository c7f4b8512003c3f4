"""The compiled selective scan: against float64, and in equal bits however a sequence is cut."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.ops import reference


class Scan(NamedTuple):
    """Arguments of the op, in its order."""

    u: Tensor
    delta: Tensor
    log_decay: Tensor
    k: Tensor
    q: Tensor
    state: Tensor
    state_indices: Tensor
    cu_seqlens: Tensor | None

    def double(self) -> "Scan":
        return Scan(*(x.double() if x is not None and x.is_floating_point() else x for x in self))

    def part(self, start: int, stop: int, slot: int) -> "Scan":
        """The tokens of one segment, on the same pool."""
        cut = {name: getattr(self, name)[start:stop] for name in ("u", "delta", "k", "q")}
        ends = torch.tensor([0, stop - start], dtype=torch.int32)
        rows = torch.tensor([slot], dtype=torch.int32)
        return self._replace(**cut, state_indices=rows, cu_seqlens=ends)


def make(lengths: list[int], slots: list[int], channels: int, width: int) -> Scan:
    """As a Mamba layer makes them: k and q are slices of one product, the state a layer of many."""
    generator = torch.Generator().manual_seed(channels + width)
    tokens = sum(lengths)
    stacked = torch.randn(tokens, 2 * width + 5, generator=generator)
    u = torch.randn(tokens, channels + 3, generator=generator)[:, :channels]
    delta = torch.rand(tokens, channels, generator=generator) + 0.01
    log_decay = -torch.arange(1, width + 1.0).expand(channels, width).contiguous()
    state = torch.randn(9, 2, channels, width, generator=generator)[:, 1]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    k, q = stacked[:, 5 : 5 + width], stacked[:, 5 + width :]
    return Scan(u, delta, log_decay, k, q, state, torch.tensor(slots, dtype=torch.int32), ends)


@pytest.mark.parametrize("width", [1, 4, 16, 17, 64])
@pytest.mark.parametrize("channels", [1, 40, 130])
def test_widths(channels: int, width: int) -> None:
    case = make([1, 5, 0, 2], [4, -1, 0, 7], channels, width)
    exact = case.double()
    expected = reference.selective_scan(*exact)
    before = case.state.clone()
    out = ops.selective_scan(*case)
    assert ((out - expected).abs() <= 4e-6 * expected.abs().amax().clamp_min(1)).all()
    torch.testing.assert_close(case.state.double(), exact.state, rtol=1e-5, atol=1e-6)
    untouched = [1, 2, 3, 5, 6, 8]
    assert torch.equal(case.state[untouched], before[untouched])
    assert not out[1:6].any()


def test_bits_depend_on_the_row_alone() -> None:
    together = make([7, 1, 4], [2, 8, 5], 140, 16)
    alone = together._replace(state=together.state.clone())
    expected = ops.selective_scan(*together)
    for start, stop, slot in ((0, 3, 2), (3, 4, 2), (4, 7, 2), (7, 8, 8), (8, 12, 5)):
        out = ops.selective_scan(*alone.part(start, stop, slot))
        assert torch.equal(out, expected[start:stop])
    assert torch.equal(alone.state, together.state)


def test_one_token_each_needs_no_cu_seqlens() -> None:
    case = make([1, 1, 1], [3, 1, 6], 24, 16)
    other = case._replace(state=case.state.clone(), cu_seqlens=None)
    assert torch.equal(ops.selective_scan(*case), ops.selective_scan(*other))
    assert torch.equal(case.state, other.state)


def test_opcheck() -> None:
    case = make([2, 1], [3, -1], 8, 16)
    case = case._replace(state=case.state.contiguous())
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.cottention.selective_scan.default, tuple(case), test_utils=tests
    )


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("delta", lambda x: x[:, 1:], r"delta.size\(1\)"),
        ("k", lambda x: x[1:], r"k.size\(0\)"),
        ("q", lambda x: x.double(), "q has the wrong dtype"),
        ("log_decay", lambda x: x[1:], r"log_decay.size\(0\)"),
        ("state", lambda x: x[:, :, 1:], r"state.size\(2\)"),
        ("state_indices", lambda x: x + 9, "out of range"),
        ("cu_seqlens", lambda x: x + 1, "rise from 0"),
    ],
)
def test_wrong_arguments_are_refused(
    name: str, wrong: Callable[[Tensor], Tensor], message: str
) -> None:
    case = make([3, 1], [0, 1], 8, 16)
    before = case.state.clone()
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.selective_scan(*case._replace(**{name: wrong(getattr(case, name))}))
    assert torch.equal(case.state, before)

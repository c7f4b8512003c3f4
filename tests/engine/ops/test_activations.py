"""Activations, norm, convolution and scan: accuracy, and equal bits alone and together."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.ops import reference

FUNCTIONS = {
    "silu": (ops.silu, reference.silu),
    "sigmoid": (ops.sigmoid, torch.sigmoid),
    "softplus": (ops.softplus, reference.softplus),
    "tanh": (ops.tanh, torch.tanh),
    "exp": (ops.exp, torch.exp),
}
each_function = pytest.mark.parametrize(("op", "exact"), FUNCTIONS.values(), ids=FUNCTIONS)
Function = Callable[[Tensor], Tensor]


@each_function
def test_accuracy(op: Function, exact: Function) -> None:
    far = torch.linspace(-80, 80, 100_003)
    near = torch.tensor([0.0, -1e-30, 1e-6, -1e-3, 0.2499, 0.2501, -0.25])
    x = torch.cat([far, near])
    assert torch.equal(op(x.view(1, 2, -1)).flatten(), op(x)), "any shape"
    expected = exact(x.double())
    assert ((op(x).double() - expected).abs() <= 3e-7 * expected.abs() + 1e-37).all()
    assert torch.equal(exact(x.double()), op(x.double())), "float64 takes the reference"
    assert op(torch.tensor([float("nan"), 1.0])).isnan().tolist() == [True, False]


@pytest.mark.parametrize("op", [op for op, _ in FUNCTIONS.values()], ids=FUNCTIONS)
def test_an_element_does_not_depend_on_its_index(op: Function) -> None:
    x = torch.randn(9, 200)[:, 3:120]
    whole = op(x)
    for start in range(0, 40):
        assert torch.equal(op(x[2, start : start + 37]), whole[2, start : start + 37])
    assert torch.equal(op(x[4:5]), whole[4:5])
    x = torch.randn(3, 4, requires_grad=True)
    op(x).sum().backward()
    assert x.grad is not None, "gradients take the reference"


@pytest.mark.parametrize(("width", "groups"), [(1, 1), (7, 1), (48, 3), (96, 2), (1024, 1)])
def test_rms_norm(width: int, groups: int) -> None:
    stacked = 3 * torch.randn(9, width + 5)
    x, weight = stacked[:, 2 : 2 + width], torch.randn(width)
    got = ops.rms_norm(x, weight, 1e-5, groups)
    exact = ops.rms_norm(x.double(), weight.double(), 1e-5, groups)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-7)
    assert torch.equal(ops.rms_norm(x[3:4], weight, 1e-5, groups), got[3:4])


@pytest.mark.parametrize("width", [1, 7, 32, 64, 1000])
def test_sums_and_norms_of_rows(width: int) -> None:
    """Alone and among others, wherever in memory a row is."""
    generator = torch.Generator().manual_seed(width)  # a sum may happen to be near 0
    x = torch.randn(9, width + 5, generator=generator)[:, 2 : 2 + width]
    weight, bias = torch.randn(width), torch.randn(width)
    for op in (ops.row_sums, lambda x: ops.layer_norm(x, weight.to(x), bias.to(x), 1e-5)):
        got, exact = op(x), op(x.double())
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
        assert torch.equal(op(x[3:4].clone()), got[3:4])
        assert torch.equal(op(x[1:7]), got[1:7])


def convolved(
    lengths: list[int], channels: int, width: int, *, has_bias: bool
) -> dict[str, Tensor]:
    """Arguments of short_convolution: segments of these lengths on a pool with a layer's stride."""
    generator = torch.Generator().manual_seed(channels)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    made = {
        "x": torch.randn(int(bounds[-1]), channels + 4, generator=generator)[:, :channels],
        "weight": torch.randn(width, channels, generator=generator),
        "tails": torch.randn(9, 2, width - 1, channels, generator=generator)[:, 1],
        "state_indices": torch.randperm(9, generator=generator)[: len(lengths)].int(),
        "cu_seqlens": bounds,
    }
    return made | {"bias": torch.randn(channels, generator=generator) if has_bias else None}


@pytest.mark.parametrize(
    ("lengths", "channels", "width", "has_bias"),
    [
        ([1], 3, 2, True),
        ([5, 1, 0, 2, 9], 40, 4, True),
        ([3, 7], 1100, 4, False),
        ([2], 8, 1, True),
    ],
)
def test_short_convolution(lengths: list[int], channels: int, width: int, has_bias: bool) -> None:
    """The compiled op has the reference's bits: both round after every operation."""
    made = convolved(lengths, channels, width, has_bias=has_bias)
    made["state_indices"][0] = ops.PADDING_SLOT if len(lengths) > 1 else 2
    other = made | {"tails": made["tails"].clone()}
    assert torch.equal(reference.short_convolution(**other), ops.short_convolution(**made))
    assert torch.equal(other["tails"], made["tails"])


def test_short_convolution_may_be_cut_anywhere() -> None:
    """It is torch's convolution of the tail and the tokens, and in pieces has the same bits."""
    made = convolved([12], 24, 4, has_bias=True)
    x, weight, bias, tails = (made[name] for name in ("x", "weight", "bias", "tails"))
    slot = made["state_indices"]
    joined = torch.cat([tails[int(slot)], x]).double()
    expected = torch.nn.functional.conv1d(
        joined.T, weight.T.unsqueeze(1).double(), bias.double(), groups=24
    ).T
    pieces = tails.clone()
    whole = ops.short_convolution(**made)
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-5)
    for start, stop in ((0, 1), (1, 3), (3, 4), (4, 12)):
        ends = torch.tensor([0, stop - start], dtype=torch.int32)
        part = ops.short_convolution(x[start:stop], weight, bias, pieces, slot, ends)
        assert torch.equal(part, whole[start:stop])
    assert torch.equal(pieces, tails)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("slots", [[-1, 3, -1, 0], [-1, -1, -1, -1]])
def test_padding_changes_no_row(slots: list[int], dtype: torch.dtype) -> None:
    """One token each, as captured graphs run it: padding may stand anywhere, and everywhere."""
    generator = torch.Generator().manual_seed(2)
    x, delta = (torch.randn(4, 8, generator=generator, dtype=dtype) for _ in range(2))
    k, q, weight = (torch.randn(4, 8, generator=generator, dtype=dtype) for _ in range(3))
    tails = torch.randn(5, 3, 8, generator=generator, dtype=dtype)
    state = torch.randn(5, 8, 8, generator=generator, dtype=dtype)
    indices = torch.tensor(slots, dtype=torch.int32)
    new_tails, new_state = tails.clone(), state.clone()
    log_decay = -torch.ones(8, 8, dtype=dtype)
    outs = [
        ops.short_convolution(x, weight, None, new_tails, indices),
        ops.selective_scan(x, delta, log_decay, k, q, new_state, indices),
    ]
    real = [slot for slot in slots if slot >= 0]
    unused = [row for row in range(5) if row not in real]
    for old, new in ((tails, new_tails), (state, new_state)):
        assert torch.equal(old[unused], new[unused])
        assert not real or not torch.equal(old[real], new[real])
    for token, slot in enumerate(slots):
        assert all(bool(out[token].any()) == (slot >= 0) for out in outs)


def test_selective_scan_is_the_recurrence_with_one_value_row() -> None:
    """As in the paper's algorithm 2, computed by a loop over plain float64 numbers."""
    channels, width, tokens = 3, 4, 5
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    u, k, q = drawn(tokens, channels), drawn(tokens, width), drawn(tokens, width)
    delta, log_decay = drawn(tokens, channels).exp(), -drawn(channels, width).exp()
    state = drawn(4, channels, width)
    expected_state, expected = state[2].clone(), torch.zeros(tokens, channels, dtype=torch.float64)
    for t in range(tokens):
        for c in range(channels):
            for n in range(width):
                kept = float(torch.exp(delta[t, c] * log_decay[c, n])) * expected_state[c, n]
                expected_state[c, n] = kept + delta[t, c] * u[t, c] * k[t, n]
                expected[t, c] += expected_state[c, n] * q[t, n]
    slots, ends = torch.tensor([-1, 2]).int(), torch.tensor([0, 0, tokens]).int()
    out = ops.selective_scan(u, delta, log_decay, k, q, state, slots, ends)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state[2], expected_state, rtol=1e-12, atol=1e-12)


def test_opcheck() -> None:
    assert ops.backend() == "compiled"
    compiled = torch.ops.cottention
    for name in FUNCTIONS:
        torch.library.opcheck(getattr(compiled, name).default, (torch.randn(3, 40)[:, :33],))
    torch.library.opcheck(compiled.rms_norm.default, (torch.randn(3, 6), torch.ones(6), 1e-5, 2))
    made = convolved([3, 1], 8, 4, has_bias=True)
    names = ("x", "weight", "bias", "tails", "state_indices", "cu_seqlens")
    made["tails"] = made["tails"].contiguous()
    torch.library.opcheck(compiled.short_convolution.default, tuple(made[name] for name in names))


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("weight", lambda x: x[:, 1:], r"weight.size\(1\)|contiguous"),
        ("bias", lambda x: x[1:], r"bias.size\(0\)"),
        ("tails", lambda x: x[:, 1:], r"tails.size\(1\)"),
        ("tails", lambda x: x.double(), "tails has the wrong dtype"),
        ("state_indices", lambda x: x + 9, "out of range"),
        ("cu_seqlens", lambda x: x + 1, "rise from 0"),
        ("x", lambda x: x.T.contiguous().T, "contiguous"),
    ],
)
def test_wrong_arguments_are_refused(
    name: str, wrong: Callable[[Tensor], Tensor], message: str
) -> None:
    made = convolved([3, 1], 8, 4, has_bias=True)
    made[name] = wrong(made[name])
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.short_convolution(**made)

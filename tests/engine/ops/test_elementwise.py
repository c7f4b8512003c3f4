"""Rotary, features, both gelus and elu_plus_one: against float64, at every place and stride."""

from collections.abc import Callable
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.ops import reference
from cottention.engine.scheduling.context_policy import MAX_HELD


def _features(width: int, rotary: int, tokens: int = 7, heads: int = 3) -> tuple[Tensor, ...]:
    """Arguments of cottention_features: slices of one projection, far and near positions."""
    generator = torch.Generator().manual_seed(width + rotary)
    stacked = torch.randn(tokens, 3 * heads * width + 9, generator=generator)
    q, k, v = stacked[:, : 3 * heads * width].view(tokens, 3, heads, width).unbind(1)
    positions = torch.randint(0, 1_000_000, (tokens,), generator=generator)
    positions[0] = 0
    sigma = torch.rand(heads, dtype=torch.float64, generator=generator)
    return q, k, v, positions, sigma, *ops.rotary_table(positions, rotary, 1e4, torch.float32)


@pytest.mark.parametrize("rotary", [2, 16, 64])
def test_rotary_table(rotary: int) -> None:
    positions = torch.tensor([0, 1, 2, 511, 1023, 1_000_000])
    exact = reference.rotary_table(positions, rotary, 1e4)
    for got, expected in zip(
        ops.rotary_table(positions, rotary, 1e4, torch.float32), exact, strict=True
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=6e-8)
    assert torch.equal(ops.rotary_table(positions, rotary, 1e4)[0], exact[0])


def true_angle(position: int, i: int, rotary: int) -> float:
    """Within a turn, from fifty digits."""
    with localcontext(prec=50):
        angle = position * Decimal(10_000) ** (Decimal(-2 * i) / rotary)
        return float(angle % (2 * Decimal("3.14159265358979323846264338327950288419716939937511")))


def test_rotary_table_at_the_last_position() -> None:
    last, rotary = MAX_HELD - 1, 64
    angles = [true_angle(last, i, rotary) for i in range(rotary // 2)]
    expected = torch.tensor(angles, dtype=torch.float64)
    at = torch.tensor([last])
    for table in (
        reference.rotary_table(at, rotary, 1e4),
        ops.rotary_table(at, rotary, 1e4, torch.float32),
    ):
        for got, wave in zip(table, (expected.cos(), expected.sin()), strict=True):
            torch.testing.assert_close(got[0].double(), wave, rtol=0, atol=2**-12)


@pytest.mark.parametrize(
    ("width", "rotary"), [(8, 8), (16, 4), (20, 6), (64, 64), (80, 32), (128, 64), (256, 0)]
)
def test_features(width: int, rotary: int) -> None:
    arguments = _features(width, rotary)
    q, k, v, positions, *_ = arguments
    exact = reference.cottention_features(
        q.double(), k.double(), v.double(), positions, *(x.double() for x in arguments[4:])
    )
    torch.full(q.shape, float("nan"))
    for got, expected in zip(ops.cottention_features(*arguments), exact, strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got.double(), expected, rtol=4e-7, atol=4e-7)


def test_features_of_no_tokens() -> None:
    q, k, v, *rest = _features(64, 64)
    mapped = ops.cottention_features(torch.zeros_like(q), k, v, *rest)
    assert torch.equal(mapped[0], torch.zeros_like(q))


def test_a_token_has_equal_features_in_any_batch() -> None:
    arguments = _features(80, 32, tokens=65)
    together = ops.cottention_features(*arguments)
    q, k, v, positions, sigma, cos, sin = arguments
    for i in (0, 31, 64):
        at = slice(i, i + 1)
        alone = ops.cottention_features(q[at], k[at], v[at], positions[at], sigma, cos[at], sin[at])
        assert all(torch.equal(a, b[at]) for a, b in zip(alone, together, strict=True))


def test_gradients_take_the_reference() -> None:
    q, *rest = _features(16, 8)
    q = q.clone().requires_grad_()
    ops.cottention_features(q, *rest)[0].sum().backward()
    assert q.grad is not None
    x = torch.randn(3, 5, requires_grad=True)
    ops.gelu_new(x).sum().backward()
    assert x.grad is not None


each_gelu = pytest.mark.parametrize("name", ["gelu_new", "gelu_erf"])


@pytest.mark.parametrize(("name", "tolerance"), [("gelu_new", 2e-7), ("gelu_erf", 3e-7)])
def test_gelu_accuracy(name: str, tolerance: float) -> None:
    x = torch.cat([torch.linspace(-30, 30, 100_003), torch.tensor([0.0, -1e-30, 1e-30, 1e30])])
    exact = getattr(reference, name)(x.double())
    error = (getattr(ops, name)(x.unsqueeze(0))[0].double() - exact).abs()
    assert (error <= tolerance * x.double().abs()).all()


@each_gelu
def test_gelu_keeps_nan(name: str) -> None:
    out = getattr(ops, name)(torch.tensor([[float("nan"), float("inf"), 1.0]]))[0]
    assert out.isnan().tolist() == [True, False, False]
    assert out[1] == float("inf")


@each_gelu
def test_gelu_of_an_element_does_not_depend_on_its_index(name: str) -> None:
    x, gelu = torch.randn(101), getattr(ops, name)
    whole = gelu(x.unsqueeze(0))[0]
    for start in range(0, 40):
        assert torch.equal(gelu(x[start : start + 37].unsqueeze(0))[0], whole[start : start + 37])
    rows = torch.randn(9, 200)[:, 3:120]
    assert torch.equal(gelu(rows), gelu(rows.contiguous()))
    assert gelu(rows).is_contiguous()


def test_elu_plus_one_accuracy_and_nan() -> None:
    x = torch.cat([torch.linspace(-80, 30, 100_003), torch.tensor([0.0, -1e-30, 1e30])])
    exact = reference.elu_plus_one(x.double())
    got = ops.elu_plus_one(x[None, None])[0, 0].double()
    assert ((got - exact).abs() <= 2e-7 * exact).all()
    out = ops.elu_plus_one(torch.tensor([[[float("nan"), float("-inf"), 1.0]]]))[0, 0]
    assert out.isnan().tolist() == [True, False, False]
    assert 0 <= float(out[1]) < 1e-37


def test_elu_plus_one_of_an_element_does_not_depend_on_its_index() -> None:
    x = torch.randn(9, 5, 24)
    whole = ops.elu_plus_one(x)
    assert torch.equal(ops.elu_plus_one(x[3:4]), whole[3:4])
    assert torch.equal(ops.elu_plus_one(x[:, 1:3, 5:]), whole[:, 1:3, 5:])


def test_float64_takes_the_reference() -> None:
    x = torch.randn(4, 3, 9, dtype=torch.float64)
    assert torch.equal(ops.gelu_new(x[0]), reference.gelu_new(x[0]))
    assert torch.equal(ops.gelu_erf(x[0]), reference.gelu_erf(x[0]))
    assert torch.equal(ops.elu_plus_one(x), reference.elu_plus_one(x))


def test_opcheck() -> None:
    assert ops.backend() == "compiled"
    arguments = _features(16, 8)
    compiled = torch.ops.cottention
    torch.library.opcheck(compiled.cottention_features.default, arguments)
    torch.library.opcheck(compiled.rotary_table.default, (arguments[3], 8, 1e4))
    for op in (compiled.gelu_new, compiled.gelu_erf, compiled.elu_plus_one):
        torch.library.opcheck(op.default, (torch.randn(3, 40)[:, :33],))


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (1, lambda x: x[:2], r"k.size\(0\)"),
        (2, lambda x: x.double(), "v has the wrong dtype"),
        (3, lambda x: x.int(), "positions has the wrong dtype"),
        (4, lambda x: x[:1], r"sigma.size\(0\)"),
        (5, lambda x: x.repeat(1, 3), "sin"),
        (0, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "contiguous"),
        (6, lambda x: x.to("meta"), "one device"),
    ],
)
def test_wrong_features_are_refused(
    place: int, wrong: Callable[[Tensor], Tensor], message: str
) -> None:
    arguments = list(_features(16, 8))
    arguments[place] = wrong(arguments[place])
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.cottention_features(*arguments)


def test_wrong_rotary_and_gelu_are_refused() -> None:
    with pytest.raises(RuntimeError, match="even"):
        ops.rotary_table(torch.arange(3), 7, 1e4, torch.float32)
    with pytest.raises(RuntimeError, match="contiguous"):
        ops.gelu_new(torch.randn(4, 5).T)
    q, k, v, positions, sigma, *_ = _features(16, 8)
    wide = ops.rotary_table(positions, 32, 1e4, torch.float32)
    with pytest.raises(RuntimeError, match="rotary_dim"):
        ops.cottention_features(q, k, v, positions, sigma, *wide)

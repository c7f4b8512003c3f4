"""The product of fixed order: close to float64, and a row's bits are its own."""

import pytest
import torch

from cottention.engine import ops
from cottention.engine.ops.linear import linear_in_tiles

SHAPES = [(60, 257), (256, 64), (1, 1), (129, 130), (300, 63), (1000, 100)]


def _weights(channels: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(channels + columns)
    weight = torch.randn(columns, channels, generator=generator) / channels**0.5
    return weight, torch.randn(columns, generator=generator)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("channels", "columns"), SHAPES)
def test_close_to_float64(channels: int, columns: int, with_bias: bool) -> None:
    weight, bias = _weights(channels, columns)
    layer = ops.FixedOrderLinear(weight, bias if with_bias else None)
    assert layer.is_packed
    for rows in (0, 1, 3, 63, 200):
        x = torch.randn(rows, channels)
        torch.full((rows, columns), float("nan"))
        exact = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
        torch.testing.assert_close(layer(x).double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("channels", "columns"), SHAPES)
def test_a_row_has_equal_bits_in_any_batch(channels: int, columns: int) -> None:
    layer = ops.FixedOrderLinear(*_weights(channels, columns))
    x = torch.randn(130, channels)
    together = layer(x)
    for rows in [*range(1, 20), 63, 64, 95, 96, 97, 129]:
        assert torch.equal(layer(x[:rows]), together[:rows])
        assert torch.equal(layer(x[-rows:]), together[-rows:])


def test_bits_do_not_depend_on_threads() -> None:
    layer = ops.FixedOrderLinear(*_weights(300, 700))
    x = torch.randn(111, 300)
    together = layer(x)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(layer(x), together)
    finally:
        torch.set_num_threads(threads)


def test_rows_and_weights_with_strides() -> None:
    weight, bias = _weights(90, 80)
    x = torch.randn(37, 200)[:, 7:97]
    expected = ops.FixedOrderLinear(weight, bias)(x.contiguous())
    wide = torch.cat([weight, weight], dim=1)[:, :90]
    assert torch.equal(ops.FixedOrderLinear(wide, bias)(x), expected)


def test_rows_are_broadcast_without_a_copy() -> None:
    layer = ops.FixedOrderLinear(*_weights(64, 64))
    x = torch.randn(1, 64)
    assert torch.equal(layer(x.expand(9, 64)), layer(x).expand(9, 64))


def test_other_types_run_in_torch() -> None:
    weight, bias = _weights(60, 257)
    layer = ops.FixedOrderLinear(weight.double(), bias.double())
    x = torch.randn(40, 60, dtype=torch.float64)
    assert not layer.is_packed
    torch.testing.assert_close(layer(x), x @ weight.double().T + bias.double())


@pytest.mark.parametrize(("channels", "columns"), [(256, 1792), (60, 257)])
def test_tiles_of_one_height_keep_the_bits_of_a_row(channels: int, columns: int) -> None:
    weight, bias = _weights(channels, columns)
    x = torch.randn(100, channels)
    together = linear_in_tiles(x, weight, bias)
    for rows in (1, 5, 31, 33, 70):
        assert torch.equal(linear_in_tiles(x[:rows], weight, bias), together[:rows])
        assert torch.equal(linear_in_tiles(x[-rows:], weight, bias), together[-rows:])


@pytest.mark.parametrize(
    ("message", "x_shape", "bias_size", "columns"),
    [
        (r"packed.size\(1\)", (3, 11), 70, 70),
        (r"bias.size\(0\)", (3, 10), 69, 70),
        (r"packed.size\(0\)", (3, 10), 129, 129),
        ("dimensions", (10,), 70, 70),
    ],
)
def test_wrong_shapes_are_refused(
    message: str, x_shape: tuple[int, ...], bias_size: int, columns: int
) -> None:
    assert ops.backend() == "compiled"
    packed = torch.ops.cottention.pack_weight(torch.randn(70, 10))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cottention.linear(torch.randn(x_shape), packed, torch.randn(bias_size), columns)


def test_wrong_types_and_strides_are_refused() -> None:
    layer = ops.FixedOrderLinear(torch.randn(70, 10))
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(3, 10, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="contiguous"):
        layer(torch.randn(10, 3).T)


def test_opcheck() -> None:
    assert ops.backend() == "compiled"
    weight, bias = _weights(20, 70)
    packed = torch.ops.cottention.pack_weight(weight)
    torch.library.opcheck(torch.ops.cottention.pack_weight.default, (weight,))
    torch.library.opcheck(
        torch.ops.cottention.linear.default, (torch.randn(3, 20), packed, bias, 70)
    )

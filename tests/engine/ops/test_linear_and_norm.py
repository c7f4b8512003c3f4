"""Linear layers with bfloat16 weights and output buffers, the layer norm, and argmax."""

import pytest
import torch

from cottention.engine import ops
from cottention.engine.ops import reference

SHAPES = [(60, 257), (256, 64), (1, 1), (129, 130), (1000, 100), (515, 65)]


def _weights(channels: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(channels + columns)
    weight = torch.randn(columns, channels, generator=generator) / channels**0.5
    return weight, torch.randn(columns, generator=generator)


@pytest.mark.parametrize(("channels", "columns"), SHAPES)
def test_bfloat16_weights_are_close_to_float64(channels: int, columns: int) -> None:
    """Weights and rows are rounded to bfloat16, sums are not."""
    weight, bias = _weights(channels, columns)
    layer = ops.FixedOrderLinear(weight.bfloat16(), bias)
    assert layer.is_packed
    for rows in (0, 1, 5, 49, 100):
        x = torch.randn(rows, channels)
        torch.full((rows, columns), float("nan"))
        exact = x.bfloat16().double() @ weight.bfloat16().double().T + bias.double()
        torch.testing.assert_close(layer(x).double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_equal_bits_in_any_batch(dtype: torch.dtype) -> None:
    weight, bias = _weights(515, 130)
    layer = ops.FixedOrderLinear(weight.to(dtype), bias)
    x = torch.randn(200, 515)
    together = layer(x)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for rows in [*range(1, 14), 48, 49, 64, 97, 145, 200]:
            assert torch.equal(layer(x[-rows:]), together[-rows:])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("channels", "columns"), [(256, 64), (130, 129), (1000, 100), (514, 65)])
def test_float32_weights_that_bfloat16_has_keep_the_bits_of_float32(
    channels: int, columns: int
) -> None:
    """They take half the memory, and a folder in bfloat16 gives what its float32 form would."""
    weight, bias = _weights(channels, columns)
    weight = weight.bfloat16().float()
    layer = ops.FixedOrderLinear(weight, bias)
    packed = torch.ops.cottention.pack_weight(weight)
    for rows in (0, 1, 2, 3, 5, 8, 49, 100):
        x, out = torch.randn(rows, channels + 3)[:, 1:-2], torch.empty(rows, columns)
        torch.ops.cottention.linear_out(x, packed, bias, out)
        assert torch.equal(layer(x), out)
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        assert layer.weight.nbytes * 2 == packed.nbytes
    weight[-1, -1] = 0.1
    assert ops.FixedOrderLinear(weight, bias).weight.nbytes == packed.nbytes


def test_widened_weights_take_pairs_of_channels() -> None:
    """An odd row would be read beyond its end."""
    packed = torch.ops.cottention.pack_weight(torch.zeros(8, 11).bfloat16()).view(torch.int16)
    with pytest.raises(RuntimeError, match="even number of channels"):
        torch.ops.cottention.linear(torch.zeros(3, 11), packed, None, 8)


def test_bfloat16_keeps_nan() -> None:
    layer = ops.FixedOrderLinear(torch.ones(3, 40).bfloat16())
    x = torch.ones(3, 40)
    x[0, 7], x[1, 39] = float("nan"), float("inf")
    assert layer(x)[:2, 0].isfinite().tolist() == [False, False]
    assert layer(x)[2, 0] == 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_into_a_buffer_and_added_to_one(dtype: torch.dtype, with_bias: bool) -> None:
    weight, bias = _weights(70, 90)
    layer = ops.FixedOrderLinear(weight.to(dtype), bias if with_bias else None)
    x, residual = torch.randn(50, 70), torch.randn(50, 90)
    out, total = torch.full((50, 90), float("nan")), residual.clone()
    layer.into(x, out)
    layer.add_to(x, total)
    assert torch.equal(out, layer(x))
    assert torch.equal(total, residual + layer(x))


@pytest.mark.parametrize("width", [1, 5, 16, 100, 1024, 1030])
def test_norm_is_close_to_float64(width: int) -> None:
    x = torch.randn(9, width + 3)[:, :width] * 3 + 5
    weight, bias = torch.randn(width), torch.randn(width)
    norm = ops.FixedOrderNorm(weight, bias, 1e-5)
    exact = torch.nn.functional.layer_norm(
        x.double(), (width,), weight.double(), bias.double(), 1e-5
    )
    torch.testing.assert_close(norm(x).double(), exact, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(norm(x[i : i + 1]), norm(x)[i : i + 1]) for i in range(9))


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (torch.zeros(3, 11), torch.zeros(3, 8), r"packed.size\(1\)"),
        (torch.zeros(3, 10), torch.zeros(3, 70), r"packed.size\(0\)"),
        (torch.zeros(3, 10), torch.zeros(2, 8), r"out.size\(0\)"),
        (torch.zeros(3, 10), torch.zeros(8, 3).T, "contiguous"),
        (torch.zeros(3, 10), torch.zeros(3, 8).double(), "dtype"),
    ],
)
def test_wrong_buffers_are_refused(x: torch.Tensor, out: torch.Tensor, message: str) -> None:
    layer = ops.FixedOrderLinear(torch.zeros(8, 10))
    with pytest.raises(RuntimeError, match=message):
        layer.into(x, out)


def test_wrong_norms_are_refused() -> None:
    norm = ops.FixedOrderNorm(torch.ones(8), torch.ones(8), 1e-5)
    for x, message in ((torch.zeros(2, 9), "size"), (torch.zeros(2, 8).double(), "dtype")):
        with pytest.raises(RuntimeError, match=message):
            norm(x)


def test_opcheck() -> None:
    compiled, (weight, bias) = torch.ops.cottention, _weights(21, 70)
    torch.library.opcheck(compiled.pack_weight.default, (weight.bfloat16(),))
    for dtype in (torch.float32, torch.bfloat16):
        packed = compiled.pack_weight(weight.to(dtype))
        arguments = torch.randn(3, 21), packed, bias, torch.zeros(3, 70)
        torch.library.opcheck(compiled.linear_out.default, arguments)
        torch.library.opcheck(compiled.linear_add.default, arguments)
    row = torch.ones(21)
    arguments = torch.randn(3, 21), row, row, 1e-5, torch.zeros(3, 21)
    torch.library.opcheck(compiled.layer_norm.default, arguments)


@pytest.mark.parametrize("columns", [1, 15, 16, 33, 4096])
def test_argmax_is_the_first_largest(columns: int) -> None:
    logits = torch.randn(9, columns + 2)[:, :columns].round()
    logits[7] = -torch.inf
    logits[8, -1] = -torch.inf
    expected = reference.argmax(logits)
    assert torch.equal(ops.argmax(logits), expected)
    for wrong in (float("nan"), float("inf")):
        for place in (0, columns // 2, columns - 1):
            row = torch.randn(1, columns)
            row[0, place] = wrong
            assert ops.argmax(row).tolist() == reference.argmax(row).tolist() == [-1]


def test_argmax_of_no_rows_or_columns() -> None:
    assert ops.argmax(torch.zeros(0, 5)).shape == (0,)
    assert torch.ops.cottention.argmax(torch.zeros(2, 0)).tolist() == [-1, -1]
    torch.library.opcheck(torch.ops.cottention.argmax.default, (torch.randn(3, 20),))

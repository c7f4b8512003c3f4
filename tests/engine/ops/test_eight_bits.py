"""Weights of eight bits: the product as the reference defines it, and a row's bits its own."""

import pytest
import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.ops import reference
from tests.engine.ops.forked import run_forked
from tests.engine.ops.test_loader import _environment

SHAPES = [(60, 257), (256, 64), (1, 1), (129, 130), (1000, 100), (515, 65), (1100, 65)]


def _weights(channels: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels + columns)
    weight = torch.randn(columns, channels, generator=generator) / channels**0.5
    return weight.bfloat16(), torch.randn(columns, generator=generator)


def _layer(weight: Tensor, bias: Tensor | None = None) -> ops.FixedOrderLinear:
    with ops.weight_storage("int8"):
        return ops.FixedOrderLinear(weight, bias)


@pytest.mark.parametrize(("channels", "columns"), SHAPES)
def test_as_the_reference_defines_it(channels: int, columns: int) -> None:
    """Another rounding of weights or rows, or a group that is missing, would be a larger error."""
    weight, bias = _weights(channels, columns)
    layer, quantized = _layer(weight, bias), reference.quantize(weight.float())
    assert layer.weight.dtype == torch.int8
    for rows in (0, 1, 3, 4, 5, 49, 100):
        x = torch.randn(rows, channels + 3)[:, 1:-2]
        torch.full((rows, columns), float("nan"))
        expected = reference.quantized_linear(x, *quantized, bias)
        torch.testing.assert_close(layer(x), expected, rtol=2e-5, atol=2e-5)


def test_the_error_is_that_of_eight_bits() -> None:
    weight, _ = _weights(1024, 300)
    x = torch.randn(50, 1024)
    exact = x.double() @ weight.double().T
    assert float((_layer(weight)(x) - exact).square().mean().sqrt() / exact.std()) < 0.015


@pytest.mark.parametrize(("channels", "columns"), [(515, 130), (64, 64), (1, 1), (1100, 70)])
def test_a_row_has_equal_bits_in_any_batch(channels: int, columns: int) -> None:
    layer = _layer(*_weights(channels, columns))
    x = torch.randn(200, channels)
    together = layer(x)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for rows in [*range(1, 14), 48, 49, 64, 97, 145, 200]:
            assert torch.equal(layer(x[-rows:]), together[-rows:])
    finally:
        torch.set_num_threads(threads)


def test_a_row_that_is_not_finite_or_tiny_spoils_no_other() -> None:
    """The scale of a group without a size would be infinite, and 0 times it no number."""
    weight, bias = _weights(130, 70)
    layer, x = _layer(weight, bias), torch.randn(5, 130)
    good = layer(x)
    x[0, 7], x[1, 129], x[2], x[3] = float("nan"), float("inf"), 0, x[3] * 1e-40
    out = layer(x)
    assert out[:2].isfinite().sum() == 0
    assert torch.equal(out[2:4], bias.expand(2, 70))
    assert torch.equal(out[4], good[4])


def test_weights_in_float32_are_kept() -> None:
    """A family names the matrices that bear no rounding, such as RWKV-7's of low rank."""
    weight = _weights(64, 64)[0].float() + 1e-3
    assert _layer(weight).weight.dtype == torch.float32
    assert ops.FixedOrderLinear(weight.bfloat16()).weight.dtype == torch.bfloat16


def test_wrong_buffers_are_refused() -> None:
    layer = _layer(*_weights(70, 80))
    with pytest.raises(RuntimeError, match=r"packed.size\(1\)"):
        layer(torch.zeros(3, 129))
    with pytest.raises(RuntimeError, match="dtype"):
        torch.ops.cottention.quantize_weight(torch.zeros(3, 3, dtype=torch.float64))


def test_opcheck() -> None:
    weight, bias = _weights(21, 70)
    torch.library.opcheck(torch.ops.cottention.quantize_weight.default, (weight.float(),))
    packed = torch.ops.cottention.quantize_weight(weight.float())
    arguments = torch.randn(3, 21), packed, bias, torch.zeros(3, 70)
    torch.library.opcheck(torch.ops.cottention.linear_out.default, arguments)


BITS = """
import hashlib, torch
from cottention.engine import ops
torch.manual_seed(0)
x, weight = torch.randn(61, 515), torch.randn(130, 515)
for dtype, kind in (
    (torch.float32, "packed"), (torch.bfloat16, "packed"), (torch.bfloat16, "int8"),
    (torch.bfloat16, "compressed"),
):
    with ops.weight_storage(kind):
        out = ops.FixedOrderLinear(weight.to(dtype))(x)
    print(hashlib.sha256(out.numpy().tobytes()).hexdigest())
"""


def test_vectors_of_any_width_give_equal_bits() -> None:
    """A session that moves to a machine with another instruction set would go on differently."""
    ops.backend()
    sets = ["avx2", "avx512", "avx512_bf16"]
    done = run_forked([(BITS, _environment(COTTENTION_CPU_ISA=isa)) for isa in sets])
    found = [each.out for each in done if "not one of" not in each.err]
    assert len(set(found)) <= 1
    assert all(len(out.splitlines()) == 4 for out in found)

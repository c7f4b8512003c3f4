"""Compressed weights: the bits of the product are those of the weights that they were made from."""

import pytest
import torch
from torch import Tensor

from cottention.engine import ops

SHAPES = [(60, 257), (256, 64), (1, 1), (129, 130), (1000, 100), (515, 65), (1100, 70)]
ROWS = [0, *range(1, 15), 24, 25, 36, 37, 64, 128, 129, 200]

pytestmark = pytest.mark.skipif(not ops.has_wide_vectors(), reason="no AVX2")


def _weight(channels: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(channels + columns)
    return (torch.randn(columns, channels, generator=generator) / channels**0.5).bfloat16()


def _packed(weight: Tensor) -> Tensor:
    assert ops.backend() == "compiled"
    packed: Tensor = torch.ops.cottention.pack_weight(weight)
    return packed


def _compressed(weight: Tensor) -> Tensor:
    compressed: Tensor = torch.ops.cottention.compress_weight(_packed(weight))
    return compressed


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize(("channels", "columns"), SHAPES)
def test_any_number_of_rows_has_the_bits_of_packed_weights(channels: int, columns: int) -> None:
    weight = _weight(channels, columns)
    packed, compressed = _packed(weight), _compressed(weight)
    x = torch.randn(max(ROWS), channels + 3)[:, 1:-2]
    bias = torch.randn(columns)
    for rows in ROWS:
        expected = torch.ops.cottention.linear(x[:rows], packed, bias, columns)
        found = torch.ops.cottention.linear(x[:rows], compressed, bias, columns)
        assert _same_bits(found, expected), rows


@pytest.mark.parametrize("rows", [1, 2, 9, 40])
def test_what_has_no_code_is_kept(rows: int) -> None:
    """Sixteen upper bytes have codes; these weights have all that there are, in every word."""
    channels, columns = 512, 130
    bits = torch.arange(columns * channels, dtype=torch.int32) * 40_503 & 0xFFFF
    weight = bits.to(torch.uint16).view(torch.bfloat16).view(columns, channels)
    weight = torch.where(weight.isfinite() & (weight.abs() < 1e30), weight, 0)
    weight[3, 5], weight[70, 511] = float("inf"), float("nan")
    x = torch.randn(rows, channels)
    packed, compressed = _packed(weight), _compressed(weight)
    expected = torch.ops.cottention.linear(x, packed, None, columns)
    assert _same_bits(torch.ops.cottention.linear(x, compressed, None, columns), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_either_type_is_a_quarter_smaller(dtype: torch.dtype) -> None:
    """Float32 weights that bfloat16 holds keep the arithmetic of float32."""
    weight, bias, x = _weight(512, 300).to(dtype), torch.randn(300), torch.randn(40, 512)
    layer = ops.FixedOrderLinear(weight, bias)
    with ops.weight_storage("compressed") as storage:
        compressed = ops.FixedOrderLinear(weight, bias)
    assert storage.num_compressed == 1
    assert compressed.weight.nbytes < 0.76 * layer.weight.nbytes
    for rows in (1, 2, 12, 40):
        assert _same_bits(compressed(x[:rows]), layer(x[:rows]))


def test_what_would_not_be_smaller_is_kept_as_it_is() -> None:
    bits = torch.randint(0x7F80, (128, 128), dtype=torch.int32)
    of_all_exponents = bits.to(torch.uint16).view(torch.bfloat16)
    with ops.weight_storage("compressed") as storage:
        assert ops.FixedOrderLinear(of_all_exponents).weight.dtype == torch.bfloat16
        assert ops.FixedOrderLinear(torch.randn(64, 64)).weight.dtype == torch.float32
    assert storage.num_compressed == 0
    with ops.weight_storage("packed"):
        assert ops.FixedOrderLinear(_weight(64, 64)).weight.dtype == torch.bfloat16


def test_wrong_buffers_are_refused() -> None:
    compressed = _compressed(_weight(70, 80))
    with pytest.raises(RuntimeError, match=r"packed.size\(1\)"):
        torch.ops.cottention.linear(torch.zeros(3, 129), compressed, None, 80)
    with pytest.raises(RuntimeError, match=r"packed.size\(0\)"):
        torch.ops.cottention.linear(torch.zeros(3, 70), compressed, None, 200)
    with pytest.raises(RuntimeError, match="no header"):
        torch.ops.cottention.linear(torch.zeros(3, 70), compressed[:, :60].contiguous(), None, 80)
    odd = _compressed(_weight(71, 80)).view(torch.int32)
    with pytest.raises(RuntimeError, match="even number"):
        torch.ops.cottention.linear(torch.zeros(3, 71), odd, None, 80)
    with pytest.raises(RuntimeError, match="dtype"):
        torch.ops.cottention.compress_weight(torch.zeros(1, 1, 128))


def test_opcheck() -> None:
    weight = _weight(21, 70)
    torch.library.opcheck(torch.ops.cottention.compress_weight.default, (_packed(weight),))
    arguments = torch.randn(3, 21), _compressed(weight), torch.randn(70), torch.zeros(3, 70)
    torch.library.opcheck(torch.ops.cottention.linear_out.default, arguments)

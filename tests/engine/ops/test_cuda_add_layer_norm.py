"""add_layer_norm on CUDA against float64; without a GPU, its threads are emulated on the host."""

import pytest
import torch
from torch import Tensor

from cottention.engine import ops
from tests.engine.cuda_on_host import Place, on_host

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def drawn(rows: int, columns: int) -> list[Tensor]:
    """x, y, weight and bias; x far from 0, where a careless variance is lost."""
    generator = torch.Generator().manual_seed(columns)
    x, y = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(columns, generator=generator) for _ in range(2))
    return [x + 30, y, weight, bias]


@pytest.mark.parametrize("is_added", [False, True])
@pytest.mark.parametrize("out_type", DTYPES)
@pytest.mark.parametrize("y_type", DTYPES)
@pytest.mark.parametrize("columns", [1, 6, 64, 515, 1024, 2052])
def test_parity(
    place: Place, columns: int, y_type: torch.dtype, out_type: torch.dtype, is_added: bool
) -> None:
    namespace, device = place
    x, y, weight, bias = drawn(3, columns)
    y = y.to(y_type)
    total = x.double() + y.double() if is_added else x.double()
    exact = torch.nn.functional.layer_norm(total, (columns,), weight.double(), bias.double(), 1e-5)
    there, added = x.to(device), y.to(device) if is_added else None
    out = torch.full_like(there, float("nan"), dtype=out_type)
    namespace.add_layer_norm(there, added, weight.to(device), bias.to(device), 1e-5, out)
    torch.testing.assert_close(there.cpu().double(), total, rtol=1e-6, atol=0)
    tolerance = ROUNDING[out_type] * exact.abs().amax() + 3e-6
    assert ((out.cpu().double() - exact).abs() <= 3 * tolerance).all()


def test_it_is_torchs_where_there_is_no_kernel() -> None:
    x, y, weight, bias = drawn(3, 24)
    expected = torch.nn.functional.layer_norm(x + y, (24,), weight, bias, 1e-5)
    out = ops.add_layer_norm(x, y, weight, bias, 1e-5, torch.bfloat16)
    assert torch.equal(out, expected.bfloat16())
    assert torch.equal(x, drawn(3, 24)[0] + y)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x", "x has the wrong dtype"),
        ("y", r"y.size\(0\) must be 3"),
        ("weight", r"weight.size\(0\) must be 8"),
        ("out", "out must be contiguous"),
    ],
)
def test_wrong_arguments_are_refused_on_the_host(name: str, message: str) -> None:
    x, y, weight, bias = drawn(3, 8)
    given = {"x": x, "y": y, "weight": weight, "bias": bias, "epsilon": 1e-5, "out": x.clone()}
    wrong = {"x": x.double(), "y": y[:2], "weight": weight[:4], "out": x.T.contiguous().T}
    with pytest.raises(RuntimeError, match=message):
        on_host().add_layer_norm(**given | {name: wrong[name]})

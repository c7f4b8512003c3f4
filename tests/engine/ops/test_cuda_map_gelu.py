"""map_gelu and divide_outputs on CUDA against the maps in float64, their definition.

Without a GPU their threads are emulated on the host.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.models.gptj.attention_kinds import ATTENTION_KINDS
from cottention.engine.models.gptj.feature_maps.base import TokenPositions
from cottention.engine.models.gptj.feature_maps.random_features import DENOMINATOR_COLUMNS
from cottention.engine.ops import MapKind, reference
from cottention.engine.ops.fused import MAP_KINDS
from tests.engine.cuda_on_host import Place, as_on_cuda

pytestmark = pytest.mark.usefixtures("poisoned")

TOKENS, HEADS = 3, 2
KIND_OF: dict[str, MapKind] = {
    "linear": "linear",
    "cosformer": "cosformer",
    "performer": "performer",
    "rfa": "fourier",
    "gated_rfa": "fourier",
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GELU_ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def made(
    attention: str, width: int, rotary: int, num_features: int | None
) -> tuple[TokenPositions, list[Tensor]]:
    """Positions and a layer's weights of the map."""
    kind = ATTENTION_KINDS[attention]
    config: Any = SimpleNamespace(
        n_head=HEADS,
        head_dim=width,
        n_positions=64,
        cosformer_max_length=None,
        num_random_features=num_features,
    )
    torch.manual_seed(width)
    module = torch.nn.Module()
    kind.add_weights(module, config)
    weights = [x.detach().clone() for x in kind.prepared_weights(module)]
    if len(weights) == 3:
        weights[1].normal_(std=0.1)
    index = torch.tensor([0, 17, 63])
    cos, sin = ops.rotary_table(index, rotary, 1e4, torch.float32)
    table = kind.position_table(config, index, torch.float32)
    return TokenPositions(index, cos, sin, table), weights


def exactly(
    attention: str,
    normed: Tensor,
    qkv: Sequence[Tensor],
    at: TokenPositions,
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    kind = ATTENTION_KINDS[attention]
    table = None if at.table is None else at.table.double()
    at = TokenPositions(at.index, at.cos.double(), at.sin.double(), table)
    weights = [weight.double() for weight in weights]
    q, k, v = kind.features(*(x.double() for x in qkv), at, weights)
    gate = kind.gate(normed.double(), weights)
    return q, k, v if gate is None else (1 - gate).unsqueeze(-1) * v, gate


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attention", KIND_OF)
@pytest.mark.parametrize(
    ("width", "inner", "rotary", "num_features"),
    [(8, 40, 8, None), (24, 7, 6, 16), (64, 513, 64, None), (128, 0, 64, 200), (256, 12, 0, 104)],
)
def test_parity(
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    attention: str,
    width: int,
    inner: int,
    rotary: int,
    num_features: int | None,
    dtype: torch.dtype,
) -> None:
    if place.device == "cpu":
        as_on_cuda(monkeypatch)
    at, weights = made(attention, width, rotary, num_features)
    channels, generator = HEADS * width, torch.Generator().manual_seed(inner)
    joined = torch.randn(TOKENS, 3 * channels + inner, generator=generator).to(dtype)
    normed = torch.randn(TOKENS, channels, generator=generator)
    *qkv, up = joined.split([channels] * 3 + [inner], dim=1)
    qkv = [x.unflatten(1, (HEADS, width)) for x in qkv]
    expected = exactly(attention, normed, qkv, at, weights)

    device = place.device
    out = torch.full((TOKENS, channels + inner), float("nan"), dtype=dtype, device=device)
    there = [x.to(device) for x in weights]
    got = ops.map_gelu(
        KIND_OF[attention],
        joined.to(device),
        at.cos.to(device),
        at.sin.to(device),
        out,
        HEADS,
        expected[2].shape[-1],
        table=None if at.table is None else at.table.to(device),
        projection=there[0] if there else None,
        gate=(normed.to(device), *there[1:]) if there[1:] else (),
    )
    for mapped, exact in zip(got, expected, strict=True):
        assert (mapped is None) == (exact is None)
        if mapped is not None and exact is not None:
            error = (mapped.cpu().double() - exact).abs()
            assert (error <= 2e-5 * exact.abs() + 2e-6).all(), error.max()
    assert out[:, :channels].isnan().all()
    gelu = reference.gelu_new(up.double())
    error = (out[:, channels:].cpu().double() - gelu).abs()
    assert (error <= GELU_ROUNDING[dtype] * gelu.abs().clamp_min(1)).all()


@pytest.mark.parametrize("attention", ["performer", "rfa"])
def test_queries_and_keys_of_any_size(
    place: Place, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    """Zeros have no length; long keys are limited, and the largest feature of a query is not."""
    if place.device == "cpu":
        as_on_cuda(monkeypatch)
    at, weights = made(attention, 16, 8, None)
    joined = torch.zeros(TOKENS, 3 * HEADS * 16)
    joined[1] = 1e3
    joined[2] = torch.linspace(-40, 40, 96)
    qkv = [x.unflatten(1, (HEADS, 16)) for x in joined.split(HEADS * 16, dim=1)]
    q, k, _, _ = exactly(attention, joined, qkv, at, weights)
    there = [x.to(place.device) for x in (joined, at.cos, at.sin, joined[:, : HEADS * 16])]
    projection = weights[0].to(place.device)
    got = ops.map_gelu(
        KIND_OF[attention],
        *there[:3],
        there[3].contiguous(),
        HEADS,
        24,
        projection=projection,
    )
    for mapped, exact in zip(got[:2], (q, k), strict=True):
        assert mapped.isfinite().all()
        torch.testing.assert_close(mapped.cpu().double(), exact, rtol=3e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_are_divided_by_what_keeps_its_sign(place: Place, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(4, 3, 16 + DENOMINATOR_COLUMNS, generator=generator)
    totals = torch.tensor([[2.0, -3.0, 0.5], [0.0, -0.0, 1e-9], [-1e-9, 1e-6, -1e-6], [1, -1, 4]])
    mixed[:, :, 16] = totals
    size = totals.double().abs().clamp_min(1e-6)
    exact = mixed[..., :16].double() / torch.where(totals < 0, -size, size).unsqueeze(-1)
    rows = torch.full((4, 3 * 16 + 5), float("nan"), dtype=dtype, device=place.device)
    out = rows[:, :48].unflatten(1, (3, 16))
    place.ops.divide_outputs(mixed.to(place.device), 1e-6, out)
    torch.testing.assert_close(out.cpu().float(), exact.to(dtype).float(), rtol=1e-2, atol=0)
    if dtype == torch.float32:
        torch.testing.assert_close(out.cpu().double(), exact, rtol=1e-6, atol=0)
    assert rows[:, 48:].isnan().all()


def arguments_of(attention: str) -> dict[str, Any]:
    """Of the op itself, which fit."""
    at, weights = made(attention, 16, 8, None)
    kind, channels = KIND_OF[attention], HEADS * 16
    key = {"linear": 16, "cosformer": 32, "performer": 32, "fourier": 32}[kind]
    gate = weights[1:]
    return {
        "joined": torch.zeros(TOKENS, 3 * channels + 5),
        "map": MAP_KINDS.index(kind),
        "cos": at.cos,
        "sin": at.sin,
        "table": at.table,
        "projection": weights[0] if weights else None,
        "normed": torch.zeros(TOKENS, channels) if gate else None,
        "gate_weight": gate[0] if gate else None,
        "gate_bias": gate[1] if gate else None,
        "q": torch.zeros(TOKENS, HEADS, key),
        "k": torch.zeros(TOKENS, HEADS, key),
        "v": torch.zeros(TOKENS, HEADS, 24),
        "w": torch.zeros(TOKENS, HEADS) if gate else None,
        "out": torch.zeros(TOKENS, channels + 5),
    }


@pytest.mark.parametrize(
    ("attention", "name", "wrong", "message"),
    [
        ("linear", "map", lambda _: 4, "map must be 0 to 3, not 4"),
        ("linear", "out", lambda x: x[:, :-1].clone(), "must differ by twice the channels"),
        ("linear", "q", lambda x: x.double(), "q has the wrong dtype"),
        ("linear", "k", lambda x: x[:2], r"k.size\(0\) must be 3"),
        ("linear", "v", lambda x: x[..., :8].clone(), r"v.size\(2\) must be at least 16"),
        ("linear", "projection", lambda _: torch.zeros(16, 16), "this map has no projection"),
        ("linear", "w", lambda _: torch.zeros(3, 2), "must be given together"),
        ("cosformer", "table", lambda _: None, "this map has a table"),
        ("cosformer", "table", lambda x: x[:, :1].clone(), r"table.size\(1\) must be 2"),
        ("cosformer", "sin", lambda x: x[:2], r"sin.size\(0\) must be 3"),
        ("performer", "projection", lambda _: None, "this map has a projection"),
        ("performer", "projection", lambda x: x[:, :8].clone(), r"projection.size\(1\) must be 16"),
        ("performer", "q", lambda x: x[..., :16].clone(), r"q.size\(2\) must be 32"),
        ("rfa", "projection", lambda x: x[:1], r"projection.size\(0\) must be 2"),
        ("gated_rfa", "gate_bias", lambda x: x[:1], r"gate_bias.size\(0\) must be 2"),
        ("gated_rfa", "normed", lambda x: x[:, :8].clone(), r"gate_weight.size\(1\) must be 8"),
    ],
)
def test_wrong_arguments_are_refused_on_the_host(
    monkeypatch: pytest.MonkeyPatch, attention: str, name: str, wrong: Any, message: str
) -> None:
    as_on_cuda(monkeypatch)
    given = arguments_of(attention)
    torch.ops.cottention.map_gelu(**given)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cottention.map_gelu(**given | {name: wrong(given[name])})


def test_outputs_that_do_not_fit_are_refused_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_cuda(monkeypatch)
    mixed = torch.zeros(3, 2, 24)
    for out, message in (
        (torch.zeros(3, 2, 24), "no column for the denominators"),
        (torch.zeros(2, 2, 16), r"out.size\(0\) must be 3"),
        (torch.zeros(3, 2, 32)[..., :16], "the heads of out must lie together"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.divide_outputs(mixed, 1e-6, out)

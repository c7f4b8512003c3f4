"""cottention_attention_gelu and cottention_pieces_gelu on CUDA against float64.

Without a GPU their threads are emulated on the host.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.ops import reference
from cottention.engine.ops.varlen import pieces_of
from tests.engine.cuda_on_host import Place, on_host

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}

AttentionGelu = Callable[..., None]
"""Arguments of the CPU op, segments of several tokens included."""

PIECE_TOKENS = 4


def _run(place: Place, arguments: Sequence[Tensor | None]) -> None:
    """The op that takes these segments, on copies on the device; state and out come back."""
    namespace, device = place
    *before, state_indices, cu_seqlens, out = (x if x is None else x.to(device) for x in arguments)
    if cu_seqlens is None:
        namespace.cottention_attention_gelu(*before, state_indices, cu_seqlens, out)
    else:
        assert state_indices is not None
        pieces, num_cut = pieces_of(state_indices.tolist(), cu_seqlens.tolist(), PIECE_TOKENS)
        table = torch.tensor(pieces, dtype=torch.int32, device=device)
        namespace.cottention_pieces_gelu(*before, table, num_cut, out)
    for here, there in ((arguments[5], before[5]), (arguments[8], out)):
        assert here is not None
        assert there is not None
        here.copy_(there)


@pytest.fixture
def attention_gelu(place: Place) -> AttentionGelu:
    return lambda *arguments: _run(place, arguments)


def arguments_of(
    lengths: list[int],
    state_indices: list[int],
    width: int,
    inner: int,
    rotary: int,
    dtype: torch.dtype,
) -> list[Tensor | None]:
    """As a block makes them: a first product, small and large positions, a pool, NaN in out."""
    generator = torch.Generator().manual_seed(width + inner)
    tokens, heads = sum(lengths), 3
    joined = torch.randn(tokens, 3 * heads * width + inner, generator=generator).to(dtype)
    positions = torch.randint(0, 1_000_000, (tokens,), generator=generator)
    positions[0] = 0
    sigma = torch.rand(heads, dtype=torch.float64, generator=generator)
    cos, sin = ops.rotary_table(positions, rotary, 1e4, torch.float32)
    pool = torch.randn(9, 2, heads, width, width, generator=generator)
    ends = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)
    cu_seqlens = None if all(n == 1 for n in lengths) else ends
    out = torch.full((tokens, heads * width + inner), float("nan"), dtype=dtype)
    rows = torch.tensor(state_indices, dtype=torch.int32)
    return [joined, positions, sigma, cos, sin, pool[:, 1], rows, cu_seqlens, out]


def exactly(arguments: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Output and state in float64 by the reference's three operations."""
    joined, positions, sigma, cos, sin, pool, state_indices, cu_seqlens, _ = arguments
    assert joined is not None
    assert pool is not None
    state = pool.double()
    heads, width = state.shape[1:3]
    *qkv, up = joined.double().split([heads * width] * 3 + [joined.shape[1] - 3 * heads * width], 1)
    q, k, v = (x.unflatten(1, (heads, width)) for x in qkv)
    features = reference.cottention_features(q, k, v, positions, sigma, cos, sin)
    out = reference.recurrent_step(*features, state, None, state_indices, cu_seqlens)
    return torch.cat([out.flatten(1), reference.gelu_new(up)], dim=1), state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[1, 1, 1], [2, 0, 3], [1, 2, 11]])
@pytest.mark.parametrize(
    ("width", "inner", "rotary"),
    [(8, 40, 8), (24, 7, 6), (64, 513, 64), (128, 0, 64), (80, 3, 0), (256, 12, 32)],
)
def test_parity(
    attention_gelu: AttentionGelu,
    width: int,
    inner: int,
    rotary: int,
    lengths: list[int],
    dtype: torch.dtype,
) -> None:
    arguments = arguments_of(lengths, [4, -1, 0], width, inner, rotary, dtype)
    expected, expected_state = exactly(arguments)
    out, state = arguments[8], arguments[5]
    assert out is not None
    assert state is not None
    before = state.clone()
    attention_gelu(*arguments)
    scale = expected.abs().amax()
    assert ((out.double() - expected).abs() <= ROUNDING[dtype] * scale).all()
    torch.testing.assert_close(state.double(), expected_state, rtol=1e-6, atol=1e-5)
    others = [i for i in range(9) if i not in (0, 4)]
    assert torch.equal(state[others], before[others])


def test_zeros_stay_zero(attention_gelu: AttentionGelu) -> None:
    arguments = arguments_of([1], [2], 16, 5, 8, torch.float32)
    joined, out = arguments[0], arguments[8]
    assert joined is not None
    assert out is not None
    joined.zero_()
    attention_gelu(*arguments)
    assert torch.equal(out, torch.zeros_like(out))


def test_gelu_of_extreme_values(attention_gelu: AttentionGelu) -> None:
    arguments = arguments_of([1], [2], 8, 9, 8, torch.float32)
    joined, out = arguments[0], arguments[8]
    assert joined is not None
    assert out is not None
    values = torch.tensor([-1e4, -30, -5, -1e-30, 0, 1e-30, 5, 30, 1e4])
    joined[0, -9:] = values
    attention_gelu(*arguments)
    exact = reference.gelu_new(values.double())
    assert ((out[0, -9:].double() - exact).abs() <= 3e-7 * values.double().abs()).all()


def test_segments_that_are_not_cut_are_refused_on_the_host() -> None:
    """The kernel that maps in its registers has one token for each segment."""
    arguments = arguments_of([2, 1], [2, 0], 8, 9, 8, torch.float32)
    with pytest.raises(RuntimeError, match="cottention_pieces_gelu takes segments"):
        on_host().cottention_attention_gelu(*arguments)

"""recurrent_pieces on CUDA against float64; without a GPU, its threads are emulated on the host."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cottention.engine.ops import reference
from cottention.engine.ops.varlen import pieces_of
from tests.engine.cuda_on_host import Place, on_host
from tests.engine.step_cases import Case, assert_pools, make

pytestmark = pytest.mark.usefixtures("poisoned")

Step = Callable[[Case, int], Tensor]
"""A case and the tokens of a piece, to the outputs; the case's pools are updated."""


def arguments_of(case: Case, piece_tokens: int, device: str) -> tuple[Case, Tensor, int]:
    """The case on the device, and its pieces there."""
    assert case.cu_seqlens is not None
    slots, ends = case.state_indices.tolist(), case.cu_seqlens.tolist()
    pieces, num_cut = pieces_of(slots, ends, piece_tokens)
    table = torch.tensor(pieces, dtype=torch.int32, device=device).view(-1, 5)
    return Case(*(None if x is None else x.to(device) for x in case)), table, num_cut


def step_on_host(case: Case, piece_tokens: int) -> Tensor:
    _, table, num_cut = arguments_of(case, piece_tokens, "cpu")
    out: Tensor = on_host().recurrent_pieces(*case[:5], table, num_cut)
    return out


def step_on_cuda(case: Case, piece_tokens: int) -> Tensor:
    there, table, num_cut = arguments_of(case, piece_tokens, "cuda")
    out: Tensor = torch.ops.cottention.recurrent_pieces(*there[:5], table, num_cut)
    case.state.copy_(there.state)
    if case.z is not None and there.z is not None:
        case.z.copy_(there.z)
    return out.cpu()


@pytest.fixture
def step(place: Place) -> Step:
    return step_on_host if place.device == "cpu" else step_on_cuda


def assert_parity(step: Step, case: Case, piece_tokens: int, tolerance: float = 5e-6) -> None:
    exact = case.to(torch.float64)
    expected = reference.recurrent_step(*exact)
    before = case.to(torch.float32)
    out = step(case, piece_tokens)
    assert out.dtype == case.v.dtype
    scale = expected.abs().amax().clamp_min(1e-3)
    assert ((out.double() - expected).abs() <= tolerance * scale).all()
    assert_pools(case, before, exact, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("denominator", [False, True])
@pytest.mark.parametrize("piece_tokens", [1, 4, 64])
@pytest.mark.parametrize(
    ("lengths", "slots"),
    [([1, 9, 0, 3, 17], [5, 0, 2, -1, 7]), ([5, 30], [3, 1]), ([12], [4]), ([9, 2], [-1, 3])],
)
def test_segments_of_any_length(
    step: Step, lengths: list[int], slots: list[int], piece_tokens: int, denominator: bool
) -> None:
    """Beside decoding ones, padding, and ones that end with a piece of one token."""
    assert_parity(step, make(lengths, slots, denominator=denominator), piece_tokens)


@pytest.mark.parametrize("denominator", [False, True])
@pytest.mark.parametrize(
    ("key", "value"), [(8, 16), (24, 40), (128, 128), (136, 72), (256, 48), (512, 24)]
)
def test_widths(step: Step, key: int, value: int, denominator: bool) -> None:
    case = make([7, 1, 13], [2, 0, 5], key, value, denominator=denominator, pool_size=7)
    assert_parity(step, case, 4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_sixteen_bit_inputs(step: Step, dtype: torch.dtype, tolerance: float) -> None:
    case = make([9, 1], [2, 0], 64, 32, pool_size=7)
    case = case._replace(q=case.q.to(dtype), k=case.k.to(dtype), v=case.v.to(dtype))
    assert_parity(step, case, 4, tolerance)


def test_a_batch_that_is_not_cut_has_the_bits_of_the_step(step: Step) -> None:
    """Fetching the next token's inputs ahead changes no arithmetic."""
    case = make([3, 1, 6], [2, -1, 4], 64, 24)
    is_host = step is step_on_host
    other = Case(*(x if x is None or is_host else x.cuda() for x in case.to(torch.float32)))
    out = (on_host() if is_host else torch.ops.cottention).recurrent_step(*other)
    assert torch.equal(step(case, 8), out.cpu())
    assert torch.equal(case.state, other.state.cpu())


def test_no_tokens(step: Step) -> None:
    assert step(make([], []), 4).shape == (0, 2, 64)


def test_pieces_out_of_range_touch_nothing_on_the_host() -> None:
    """A table that a fault has damaged must not reach memory that is not the batch's."""
    case = make([3, 2], [1, 4])
    before = case.to(torch.float32)
    table = torch.tensor([[99, 0, 3, 0, 0], [4, -5, 900, 1, 1]], dtype=torch.int32)
    out = on_host().recurrent_pieces(*case[:5], table, 0)
    assert not out.isnan().any()
    others = [i for i in range(len(case.state)) if i != 4]
    assert torch.equal(case.state[others], before.state[others])


@pytest.mark.parametrize(
    ("shape", "num_cut", "message"),
    [
        ((2, 4), 0, r"pieces.size\(1\) must be 5"),
        ((2, 5), 3, "num_cut must be 0 to 2, not 3"),
        ((0, 5), 0, "no pieces for 3 tokens"),
    ],
)
def test_wrong_tables_are_refused_on_the_host(
    shape: tuple[int, int], num_cut: int, message: str
) -> None:
    table = torch.zeros(shape, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=message):
        on_host().recurrent_pieces(*make([3], [1])[:5], table, num_cut)

"""What only a GPU can show: graphs, streams, checks of the op, its schema. Skipped without one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.execution.cuda_graphs import CudaCapture
from cottention.engine.ops import Segments, reference
from cottention.engine.ops.loader import is_cuda_ready
from tests.engine.step_cases import Case, far_pools, make

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def on_gpu(case: Case) -> Case:
    assert is_cuda_ready()
    return Case(*(None if x is None else x.cuda() for x in case))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("denominator", [False, True])
def test_a_captured_step_reads_its_state_indices_again(denominator: bool) -> None:
    case = make([1, 1, 1], [5, -1, 3], denominator=denominator)._replace(cu_seqlens=None)
    exact, there = case.to(torch.float64), on_gpu(case)
    run = CudaCapture()(lambda: ops.recurrent_step(*there))
    there.state.copy_(case.state)
    if there.z is not None and case.z is not None:
        there.z.copy_(case.z)
    for state_indices in ([5, -1, 3], [0, 1, 2], [-1, 5, 0]):
        there.state_indices.copy_(torch.tensor(state_indices))
        exact.state_indices.copy_(torch.tensor(state_indices))
        close(run(), reference.recurrent_step(*exact))
    close(there.state, exact.state)


def test_it_runs_on_the_current_stream() -> None:
    case = make([1] * 60, list(range(60)), 128, 128, heads=16, pool_size=60)
    case = case._replace(cu_seqlens=None)
    exact, there = case.to(torch.float64), on_gpu(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = there.v.clone().mul_(2)
        out = ops.recurrent_step(*there._replace(v=late))
    stream.synchronize()
    close(out, reference.recurrent_step(*exact._replace(v=exact.v * 2)))


@pytest.mark.parametrize("denominator", [False, True])
@pytest.mark.parametrize(("key", "value"), [(64, 64), (20, 12)])
def test_segments_of_any_length_and_width(key: int, value: int, denominator: bool) -> None:
    """By the kernel, long ones in pieces; odd widths by torch alone, in chunks."""
    lengths, state_indices = [1, 200, 3, 0, 65], [4, 2, -1, 1, 0]
    case = make(lengths, state_indices, key, value, denominator=denominator)
    exact, there = case.to(torch.float64), on_gpu(case)
    form = ops.segment_form("cuda", key, value)
    segments = Segments.of(state_indices, lengths, 12, "cuda", form=form)
    out = ops.recurrent_segments(*there[:5], segments)
    expected = reference.recurrent_step(*exact)
    assert ((out.cpu().double() - expected).abs() <= 2e-5 * expected.abs().amax()).all()
    close(there.state, exact.state)


def test_a_row_beyond_two_to_the_31st_element() -> None:
    assert is_cuda_ready()
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("less than 12 GB of memory")
    near, far = far_pools("cuda")
    there = on_gpu(make([1], [0], 512, 256, heads=16))
    expected = ops.recurrent_step(*there._replace(state=near))
    state_indices = torch.tensor([len(far) - 1], dtype=torch.int32, device="cuda")
    assert torch.equal(
        ops.recurrent_step(*there._replace(state=far, state_indices=state_indices)), expected
    )
    assert torch.equal(far[-1], near[0])


def test_no_state_indices_for_tokens_are_refused() -> None:
    there = on_gpu(make([2], [1]))
    nothing = torch.zeros(0, dtype=torch.int32, device="cuda")
    ends = torch.zeros(1, dtype=torch.int32, device="cuda")
    with pytest.raises(RuntimeError, match="no state_indices for 2 tokens"):
        ops.recurrent_step(*there._replace(state_indices=nothing, cu_seqlens=ends))


@pytest.mark.parametrize("denominator", [False, True])
def test_opcheck(denominator: bool) -> None:
    case = on_gpu(make([2, 1], [3, -1], 16, 8, denominator=denominator))
    torch.library.opcheck(torch.ops.cottention.recurrent_step.default, case)


WRONG: dict[str, Callable[[Case], Case]] = {
    "one device": lambda c: c._replace(state=c.state.cpu()),
    "k has the wrong dtype": lambda c: c._replace(k=c.k.half()),
    "state has the wrong dtype": lambda c: c._replace(state=c.state.double()),
    "the last dimension of q": lambda c: c._replace(q=c.q.mT.contiguous().mT),
    r"k.size\(1\)": lambda c: c._replace(k=c.k[:, :1]),
    r"v.size\(0\)": lambda c: c._replace(v=c.v[:3]),
    r"state.size\(3\)": lambda c: c._replace(state=c.state[..., :8]),
    "contiguous behind": lambda c: c._replace(state=c.state.mT),
    "overlap": lambda c: c._replace(state=c.state[:1].expand_as(c.state)),
    "z.size": lambda c: c._replace(z=c.state[:, :, 0, :8]),
    "state_indices has the wrong dtype": lambda c: c._replace(state_indices=c.state_indices.long()),
    "cu_seqlens.size": lambda c: c._replace(cu_seqlens=c.cu_seqlens[:2]),
    "one state index per token": lambda c: c._replace(cu_seqlens=None),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused_before_memory_is_touched(message: str) -> None:
    case = on_gpu(make([2, 3], [1, 0], 16, 16, denominator=True))
    before = case.state.clone()
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.recurrent_step(*WRONG[message](case))
    assert torch.equal(case.state, before)

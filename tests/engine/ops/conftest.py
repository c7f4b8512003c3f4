"""What tests of ops share."""

from collections.abc import Iterator

import pytest
import torch

from cottention.engine.ops.loader import is_cuda_ready
from tests.engine.cuda_on_host import Place, on_host


@pytest.fixture(params=["host", "cuda"])
def place(request: pytest.FixtureRequest) -> Place:
    """The CUDA ops emulated on the host, then those of the GPU, where there is one."""
    if request.param == "host":
        return Place(on_host(), "cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert is_cuda_ready(), "the CUDA ops must build where there is a device"
    return Place(torch.ops.cottention, "cuda")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that an op allocates is NaN: what is read before it is written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)

"""Faults of a device and faults of a request are told apart."""

from pathlib import Path

import pytest
import torch

from cottention.engine.config import EngineConfig
from cottention.engine.engine import Engine
from cottention.engine.errors import DeviceFaultError
from cottention.engine.execution.device import check_device
from cottention.engine.outputs import FinishReason
from cottention.engine.sampling_params import SamplingParams


@pytest.fixture
def engine(gptj_folder: Path) -> Engine:
    return Engine(gptj_folder, EngineConfig(max_slots=2))


def failing(engine: Engine, error: Exception) -> None:
    def run(*_: object) -> None:
        raise error

    engine._runner.run = run  # type: ignore[assignment, method-assign]
    engine.submit([1, 2], SamplingParams(max_tokens=1))


def test_a_fault_of_the_device_ends_the_engine(engine: Engine) -> None:
    """Else each later request would fail by itself, and no supervisor would know."""
    failing(engine, torch.AcceleratorError("an illegal memory access\nmore"))
    with pytest.raises(DeviceFaultError, match=r"started again: an illegal memory access$"):
        engine.step()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("a shape")])
def test_others_end_their_requests_alone(engine: Engine, error: Exception) -> None:
    failing(engine, error)
    [output] = engine.step()
    assert output.finish_reason is FinishReason.ERROR


def test_a_library_that_fails_has_the_device_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS reports a lost device as an error of its own kind."""
    error = RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    check_device("cuda", error)

    def lost(_device: str) -> None:
        raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(DeviceFaultError, match="unspecified launch failure"):
        check_device("cuda", error)
    check_device("cuda", torch.OutOfMemoryError("no room"))

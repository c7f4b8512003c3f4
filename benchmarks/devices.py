"""The devices that benchmarks run on: timing, and measurement of memory bandwidth."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cottention.engine.execution.cuda_graphs import CudaCapture

Work = Callable[[], object]


class Stream(NamedTuple):
    """Work that only reads and writes memory; num_bytes counts both."""

    work: Work
    num_bytes: int


class Device(Protocol):
    """Where a benchmark runs."""

    name: str

    def repeatable(self, work: Work) -> Work:
        """The work as the engine repeats it: on CUDA, a captured graph."""
        ...

    def time(self, work: Work) -> float:
        """Seconds of one call."""
        ...

    def num_kernels(self, work: Work) -> int | None:
        """Kernels that one call runs; None where there are none."""
        ...

    def read_speed(self, at_least: float) -> float:
        """Read bandwidth in bytes per second."""
        ...

    def stream(self, x: Tensor) -> Stream:
        """Reads and writes x at memory bandwidth; overwrites it."""
        ...


def seconds(device: Device, work: Work, *, at_least: float, most: int = 10_000) -> list[float]:
    """Sorted times of calls of `work`, for `at_least` seconds and at least three calls.

    Two calls before are not measured.
    """
    work()
    work()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < at_least and len(times) < most):
        times.append(device.time(work))
    return sorted(times)


def medians(device: Device, works: Sequence[Work], *, at_least: float) -> list[float]:
    """Median times of works called in turn, for `at_least` seconds each, at least three turns.

    In its turn each is called once unmeasured, so that the caches hold its own data.
    """
    rounds: list[list[float]] = []
    while len(rounds) < 3 or sum(map(sum, rounds)) < at_least * len(works):
        rounds.append([_second(device, work) for work in works])
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def _second(device: Device, work: Work) -> float:
    work()
    return device.time(work)


def speed(device: Device, stream: Stream, *, at_least: float) -> float:
    """Bytes per second."""
    return stream.num_bytes / statistics.median(seconds(device, stream.work, at_least=at_least))


def _read_speed(device: Device, x: Tensor, at_least: float) -> float:
    took = seconds(device, lambda: x.sum(), at_least=at_least)
    return x.nbytes / statistics.median(took)


class Cpu:
    """All threads; the stream scales memory in place."""

    name = "cpu"

    def repeatable(self, work: Work) -> Work:
        return work

    def time(self, work: Work) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def num_kernels(self, work: Work) -> int | None:  # noqa: ARG002 - as on other devices
        return None

    def read_speed(self, at_least: float) -> float:
        return _read_speed(self, torch.ones(2**28), at_least)

    def stream(self, x: Tensor) -> Stream:
        return Stream(lambda: x.mul_(0.999), 2 * x.nbytes)


class Cuda:
    """The first GPU; work is a captured graph, the stream copies one half of x to the other."""

    name = "cuda"

    def repeatable(self, work: Work) -> Work:
        return CudaCapture()(work)

    def time(self, work: Work) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return 1e-3 * start.elapsed_time(stop)

    def num_kernels(self, work: Work) -> int | None:
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiled:
            work()
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        return sum(event.device_type == on_device for event in profiled.events())

    def read_speed(self, at_least: float) -> float:
        return _read_speed(self, torch.ones(2**30, device=self.name), at_least)

    def stream(self, x: Tensor) -> Stream:
        source, target = x.view(2, -1)  # two tensors might not fit
        return Stream(lambda: target.copy_(source), x.nbytes)


DEVICES: dict[str, Device] = {"cpu": Cpu(), "cuda": Cuda()}

"""A device as the benchmarks see it: how its work is timed, and how fast its memory is."""

import statistics
import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from engine.graphs import CudaCapture

Work = Callable[[], object]


class Device(Protocol):
    """Where a benchmark runs."""

    name: str

    def repeatable(self, work: Work) -> Work:
        """Work as the engine would repeat it."""
        ...

    def time(self, work: Work) -> float:
        """Seconds that one call takes."""
        ...

    def read_speed(self, at_least: float) -> float:
        """Bytes per second at which memory is read."""
        ...

    def stream_speed(self, x: Tensor, at_least: float) -> float:
        """Bytes per second, in and out, of moving x; its values are lost."""
        ...


def seconds(device: Device, work: Work, *, at_least: float, most: int = 10_000) -> list[float]:
    """Times of `work`, repeated for `at_least` seconds and three times at least, in rising order.

    Two calls go before, unmeasured.
    """
    work()
    work()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < at_least and len(times) < most):
        times.append(device.time(work))
    return sorted(times)


def _read_speed(device: Device, x: Tensor, at_least: float) -> float:
    took = seconds(device, lambda: x.sum(), at_least=at_least)
    return x.nbytes / statistics.median(took)


class Cpu:
    """All threads together; the stream changes memory in place."""

    name = "cpu"

    def repeatable(self, work: Work) -> Work:
        return work

    def time(self, work: Work) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def read_speed(self, at_least: float) -> float:
        return _read_speed(self, torch.ones(2**28), at_least)

    def stream_speed(self, x: Tensor, at_least: float) -> float:
        took = seconds(self, lambda: x.mul_(0.999), at_least=at_least)
        return 2 * x.nbytes / statistics.median(took)


class Cuda:
    """The first GPU; work is a captured graph, the stream a copy from memory to memory."""

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

    def read_speed(self, at_least: float) -> float:
        return _read_speed(self, torch.ones(2**30, device=self.name), at_least)

    def stream_speed(self, x: Tensor, at_least: float) -> float:
        source, target = x.view(2, -1)  # a second x might not fit beside the first
        took = seconds(self, lambda: target.copy_(source), at_least=at_least)
        return x.nbytes / statistics.median(took)


DEVICES: dict[str, Device] = {"cpu": Cpu(), "cuda": Cuda()}

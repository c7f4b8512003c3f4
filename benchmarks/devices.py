"""A device as the benchmarks see it: how its work is timed, and how fast its memory is."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cottention.engine.execution.cuda_graphs import CudaCapture

Work = Callable[[], object]


class Stream(NamedTuple):
    """Work that does nothing but move so many bytes, in and out together."""

    work: Work
    num_bytes: int


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

    def stream(self, x: Tensor) -> Stream:
        """Moves x at the speed of memory; its values are lost."""
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


def medians(device: Device, works: Sequence[Work], *, at_least: float) -> list[float]:
    """Median times of works that take turns, for `at_least` seconds each and three turns at least.

    Each goes once unmeasured in its turn: it finds in the caches what it left there itself.
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

    def stream(self, x: Tensor) -> Stream:
        return Stream(lambda: x.mul_(0.999), 2 * x.nbytes)


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

    def stream(self, x: Tensor) -> Stream:
        source, target = x.view(2, -1)  # a second x might not fit beside the first
        return Stream(lambda: target.copy_(source), x.nbytes)


DEVICES: dict[str, Device] = {"cpu": Cpu(), "cuda": Cuda()}

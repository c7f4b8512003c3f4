"""Copies of states between the pool and the host, which the engine's thread never waits for.

On CUDA the stream that computes only sets a row's tensors aside, on the device: the next step may
change the row. A second stream brings them to pinned memory of the host meanwhile. A row is written
by the stream that computes, once what it is written from is there.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cottention.engine.state.state_copy import Event, StateCopy


class Stream(Protocol):
    """Work that is done in the order in which it is given, while the caller goes on."""

    def run(self, work: Callable[[], None], tensors: Sequence[Tensor]) -> None:
        """Do the work, which uses these tensors of the device, after all that was given before."""
        ...

    def record(self) -> Event:
        """The point that the stream has passed when it has done all that was given so far."""
        ...

    def wait(self, event: Event) -> None:
        """Do nothing that is given from now on before another stream has passed a point."""
        ...


class ImmediateCopies:
    """Copies on the CPU."""

    def read(self, row: Sequence[Tensor]) -> StateCopy:
        """A copy of a row's tensors."""
        return StateCopy([tensor.clone() for tensor in row])

    def write(self, row: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Set a row's tensors to a copy's."""
        _copy(row, values)


class StreamedCopies:
    """Copies of rows that `computing` changes, brought to the host by `copying`."""

    def __init__(self, computing: Stream, copying: Stream, *, is_pinned: bool = True) -> None:
        """is_pinned: whether memory of the host is pinned, without which CUDA's copies wait."""
        self._computing = computing
        self._copying = copying
        self._is_pinned = is_pinned

    def read(self, row: Sequence[Tensor]) -> StateCopy:
        """A copy of a row's tensors as they are after the work that was given before."""
        aside = [torch.empty_like(tensor) for tensor in row]
        self._computing.run(lambda: _copy(aside, row), aside)
        self._copying.wait(self._computing.record())
        host = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._is_pinned)
            for tensor in row
        ]
        self._copying.run(lambda: _copy(host, aside), aside)
        return StateCopy(host, self._copying.record())

    def write(self, row: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Set a row's tensors to a copy's, before the work that is given after."""
        if isinstance(values, StateCopy):
            if values.is_there is not None:
                self._computing.wait(values.is_there)
            values = values.unread
        if self._is_pinned:
            values = [value if value.is_pinned() else value.pin_memory() for value in values]
        self._computing.run(lambda: _copy(row, values), row)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)


class CudaStream:
    """A stream of a device; None is the one that is current, on which steps run."""

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self._own = stream

    @property
    def _stream(self) -> torch.cuda.Stream:
        return self._own or torch.cuda.current_stream()

    def run(self, work: Callable[[], None], tensors: Sequence[Tensor]) -> None:
        with torch.cuda.stream(self._stream):
            work()
        for tensor in tensors:
            tensor.record_stream(self._stream)  # its memory is not given to others before

    def record(self) -> Event:
        event: Any = torch.cuda.Event()
        event.record(self._stream)
        found: Event = event
        return found

    def wait(self, event: Any) -> None:
        self._stream.wait_event(event)


def copies_on(device: str) -> ImmediateCopies | StreamedCopies:
    """The copies of a pool on this device."""
    if not device.startswith("cuda"):
        return ImmediateCopies()
    return StreamedCopies(CudaStream(), CudaStream(torch.cuda.Stream(device)))

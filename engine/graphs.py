"""The decode step as captured graphs: one for each batch size, rounded up.

Owns the buffers that a graph reads, the rows that fill a batch up, and which graph takes it. Does
not know whose tokens they are, what is computed on them or what becomes of it. Buffers are int64;
the part of them that holds wishes is read as float64, so that one copy brings all to the device.

Letters: R rows of a graph, n rows of a batch.
"""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from cottention.engine.drawing import NO_WISH, Wish, as_tensor
from cottention.engine.ops import PADDING_SLOT, check_slots
from torch import Tensor

MAX_ROWS = 512
"""Above this a step's work hides its launches, and the logits of a graph are hundreds of MB."""

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Row(NamedTuple):
    """One token: its id, its position and the slot of its state."""

    id: int
    position: int
    slot: int


_PADDING = Row(0, 0, PADDING_SLOT)


class Step(Protocol[T_co]):
    """What is captured. It must not wait for the device."""

    def __call__(self, ids: Tensor, positions: Tensor, slots: Tensor, wishes: Tensor) -> T_co:
        """ids, positions int64 [R], slots int32 [R], wishes float64 [R, 5], always in one place."""
        ...


Capture = Callable[[Callable[[], T]], Callable[[], T]]
"""A function without arguments → one that does the same again and returns the same tensors."""


class DecodeGraphs(Generic[T]):
    """Runs a step on batches of 1 to `max_rows` rows, each in the smallest graph that holds it."""

    def __init__(
        self, step: Step[T], num_slots: int, device: str, capture: Capture[T] | None = None
    ) -> None:
        """Graphs for up to `num_slots` rows, or MAX_ROWS; `capture` is CUDA's if it is None."""
        self.max_rows = min(num_slots, MAX_ROWS)
        self._step = step
        self._num_slots = num_slots
        self._device = device
        self._capture = capture or CudaCapture()
        self._graphs: dict[int, _Graph[T]] = {}

    def warm_up(self) -> None:
        """Capture every graph, the largest first: the others then live in its memory."""
        for size in reversed(self.sizes()):
            self._graph(size)

    def sizes(self) -> list[int]:
        """Rows of the graphs: powers of two, and the largest batch."""
        powers = [2**i for i in range((self.max_rows - 1).bit_length())]
        return [*powers, self.max_rows]

    def run(self, rows: Sequence[Row], wishes: Sequence[Wish] = ()) -> T:
        """The step's outputs for rows, then for padding; they last until the next run.

        Wishes are those of the first rows; other rows may have any that came before. Raises
        ValueError for a slot that is out of range or named twice.
        """
        check_slots([row.slot for row in rows], self._num_slots)
        size = next(size for size in self.sizes() if size >= len(rows))
        return self._graph(size).run(rows, wishes)

    def _graph(self, size: int) -> "_Graph[T]":
        if size not in self._graphs:
            self._graphs[size] = _Graph(self._step, size, self._device, self._capture)
        return self._graphs[size]


class _Graph(Generic[T]):
    """The step on one number of rows."""

    def __init__(self, step: Step[T], size: int, device: str, capture: Capture[T]) -> None:
        """Captures on padding alone, so that no state moves."""
        is_cuda = device.startswith("cuda")
        self._size = size
        num_words = len(_PADDING) + len(NO_WISH)
        self._host = torch.empty(num_words, size, dtype=torch.int64, pin_memory=is_cuda)
        self._words = torch.empty_like(self._host, device=device)
        self._fill([], [NO_WISH] * size)
        self._replay = capture(lambda: step(*_read(self._words)))

    def run(self, rows: Sequence[Row], wishes: Sequence[Wish]) -> T:
        self._fill(rows, wishes)
        return self._replay()

    def _fill(self, rows: Sequence[Row], wishes: Sequence[Wish]) -> None:
        """One copy to the device. Whoever read the last outputs has waited for the one before."""
        padded = [*rows, *[_PADDING] * (self._size - len(rows))]
        self._host[: len(_PADDING)] = torch.tensor(padded).T
        if wishes:
            _wishes(self._host)[:, : len(wishes)] = as_tensor(wishes).T
        self._words.copy_(self._host, non_blocking=True)


def _wishes(words: Tensor) -> Tensor:
    """Words of 64 bits [3 + 5, R] → the last five as float64 [5, R]."""
    return words[len(_PADDING) :].view(torch.float64)


def _read(words: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a step takes."""
    ids, positions, slots = words[: len(_PADDING)]
    return ids, positions, slots.int(), _wishes(words).T


class CudaCapture:
    """Captures into CUDA graphs that share one pool of memory, because no two run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._aside = torch.cuda.Stream()  # one: libraries keep memory for each

    def __call__(self, function: Callable[[], T]) -> Callable[[], T]:
        """Run once outside, so that libraries set themselves up; then record."""
        self._aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._aside):
            function()
        torch.cuda.current_stream().wait_stream(self._aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = function()
        return Captured(graph, function, outputs)


class Captured(Generic[T]):
    """A graph, and what must live as long: the function holds the tensors that the graph reads."""

    def __init__(self, graph: torch.cuda.CUDAGraph, function: Callable[[], T], outputs: T) -> None:
        self._graph = graph
        self._function = function
        self._outputs = outputs

    def __call__(self) -> T:
        self._graph.replay()
        return self._outputs

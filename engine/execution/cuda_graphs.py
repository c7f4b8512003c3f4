"""The decode step as captured graphs: one for each batch size, rounded up.

Owns the buffers that a graph reads, the rows that fill a batch up, and which graph takes it. Does
not know whose tokens they are, what is computed on them or what becomes of it. Buffers are int64;
the part of them that holds wishes is read as float64, so that one copy brings all to the device.

Letters: R rows of a graph, n rows of a batch.

Decode in captured graphs, from ids to drawn ids: a set of graphs for each way of drawing.

Owns which set takes a batch, and what is left to do after a graph for rows that want what none
computes. Knows no requests and no state.

Letters: R rows of a graph, N vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.ops import PADDING_SLOT, check_state_indices
from cottention.engine.outputs import SampledToken
from cottention.engine.sampling.sampler import Draw, Sampler, as_sampled_token
from cottention.engine.sampling.topk_topp import (
    GREEDY_ROW,
    SamplingMode,
    SamplingRow,
    as_tensor,
    draw_ids,
)

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

    def run(self, rows: Sequence[Row], wishes: Sequence[SamplingRow] = ()) -> T:
        """The step's outputs for rows, then for padding; they last until the next run.

        Wishes are those of the first rows; other rows may have any that came before. Raises
        ValueError for a slot that is out of range or named twice.
        """
        check_state_indices([row.slot for row in rows], self._num_slots)
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
        num_words = len(_PADDING) + len(GREEDY_ROW)
        self._host = torch.empty(num_words, size, dtype=torch.int64, pin_memory=is_cuda)
        self._words = torch.empty_like(self._host, device=device)
        self._fill([], [GREEDY_ROW] * size)
        self._replay = capture(lambda: step(*_read(self._words)))

    def run(self, rows: Sequence[Row], wishes: Sequence[SamplingRow]) -> T:
        self._fill(rows, wishes)
        return self._replay()

    def _fill(self, rows: Sequence[Row], wishes: Sequence[SamplingRow]) -> None:
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


Decode = Callable[[Tensor, Tensor, Tensor], Tensor]
"""ids and positions int64 [R], slots int32 [R] → logits float32 [R, N]; states move on."""


class Likeliest(NamedTuple):
    """Logits float32 [R, N] and the likeliest ids int64 [R]."""

    logits: Tensor
    ids: Tensor


class CapturedDecode:
    """One token of each row and the ids that follow, at the cost of one launch and one answer.

    Greedy and random rows are drawn in the graph. Where a row has penalties, a bias, barred ids or
    wants log-probabilities, whose sizes differ from step to step, the graph ends with the logits.
    """

    def __init__(
        self,
        decode: Decode,
        sampler: Sampler,
        num_rows: int,
        device: str,
        capture: Capture[Any] | None = None,
    ) -> None:
        """Graphs of a pool of `num_rows`; `capture` is CUDA's if it is None."""
        capture = capture or CudaCapture()
        self._decode = decode
        self._sampler = sampler
        self._likeliest = DecodeGraphs(self._likeliest_ids, num_rows, device, capture)
        self._by_chance = {
            way: DecodeGraphs(partial(self._drawn_ids, way), num_rows, device, capture)
            for way in (SamplingMode.FROM_FIRST, SamplingMode.FROM_ALL)
        }
        self.max_rows = self._likeliest.max_rows

    def warm_up(self) -> None:
        """Capture every graph, those that need most memory first: the others then work in it.

        Their outputs are not shared; logits are 4·N bytes for each row of each graph.
        """
        for graphs in self._by_chance.values():
            graphs.warm_up()
        self._likeliest.warm_up()

    def run(self, rows: Sequence[Row], draws: Sequence[Draw]) -> list[SampledToken | None]:
        """An id for each of the first rows, as many as there are draws.

        Raises ValueError for a slot that is out of range or named twice.
        """
        if any(draw.wants_logits for draw in draws):
            logits = self._likeliest.run(rows).logits
            return self._sampler.sample(logits[: len(draws)], draws)
        way = max((draw.wish.way for draw in draws), default=SamplingMode.LIKELIEST)
        if way is SamplingMode.LIKELIEST:
            ids = self._likeliest.run(rows).ids
        else:
            ids = self._by_chance[way].run(rows, [draw.wish for draw in draws])
        return [as_sampled_token(token_id) for token_id in ids[: len(draws)].tolist()]

    def _likeliest_ids(
        self, ids: Tensor, positions: Tensor, slots: Tensor, _wishes: Tensor
    ) -> Likeliest:
        logits = self._decode(ids, positions, slots)
        return Likeliest(logits, ops.argmax(self._sampler.possible(logits)))

    def _drawn_ids(
        self, way: SamplingMode, ids: Tensor, positions: Tensor, slots: Tensor, wishes: Tensor
    ) -> Tensor:
        logits = self._sampler.possible(self._decode(ids, positions, slots))
        return draw_ids(logits, ops.argmax(logits), wishes, way)

"""Decode steps as captured graphs: one graph for each batch size and sampling mode.

`DecodeGraphs` keeps the input buffers and pads a batch to a graph's size; `CapturedDecode` samples
in the graph and brings the ids to the host. A step may follow one whose ids are not there yet: it
takes them from that one's output on the device.

Letters: R rows of a graph, N vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.ops import PADDING_SLOT, check_state_indices
from cottention.engine.sampling.sampler import Sampler
from cottention.engine.sampling.topk_topp import GREEDY_ROW, SamplingMode, sample_ids

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_ROWS = 512
"""In larger batches launches take no time of their own, and a graph's logits are hundreds of MB."""

_SMALL_SIZES = (1, 2, 4, 8, 16, 32, 64)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class DecodeRows(NamedTuple):
    """One token for each of n rows: its id, its position and the pool's row of its state.

    sources: where an id is to be taken from the last step's ids, its place among these, else −1;
    None: no id is.
    """

    ids: Sequence[int]
    positions: Sequence[int]
    slots: Sequence[int]
    sources: Sequence[int] | None = None


_NUM_COLUMNS = len(DecodeRows._fields)


class Step(Protocol[T_co]):
    """The function that is captured. It must not wait for the device."""

    def __call__(
        self, ids: Tensor, positions: Tensor, slots: Tensor, sampling_rows: Tensor
    ) -> T_co:
        """ids, positions int64 [R]; slots int32 [R]; sampling_rows float64 [R, 5].

        The tensors are the same in every call.
        """
        ...


Capture = Callable[[Callable[[], T]], Callable[[], T]]
"""Takes a function; returns one that repeats its work and returns the same tensors."""


class DecodeGraphs(Generic[T]):
    """Graphs of a step for 1 to `max_rows` rows; a batch runs in the smallest that holds it."""

    def __init__(
        self, step: Step[T], num_slots: int, device: str, capture: Capture[T] | None = None
    ) -> None:
        """Graphs for up to `num_slots` rows, at most MAX_ROWS; `capture` None is CudaCapture."""
        self.max_rows = min(num_slots, MAX_ROWS)
        self._step = step
        self._num_slots = num_slots
        self._device = device
        self._capture = capture or CudaCapture()
        self._graphs: dict[int, _Graph[T]] = {}

    def warm_up(self) -> None:
        """Capture every graph, the largest first: the others reuse its memory."""
        for size in reversed(self.sizes()):
            self._graph(size)

    def sizes(self) -> list[int]:
        """Rows of the graphs: powers of two to 64, from there in steps of 64, and `max_rows`.

        A batch of 257 rows would else take a step of 512: padding costs as much as rows do.
        """
        sizes = [*_SMALL_SIZES, *range(2 * _SMALL_SIZES[-1], MAX_ROWS, _SMALL_SIZES[-1])]
        return [*(size for size in sizes if size < self.max_rows), self.max_rows]

    def run(
        self,
        rows: DecodeRows,
        sampling_rows: "NDArray[np.float64] | None" = None,
        last_ids: Tensor | None = None,
    ) -> T:
        """The step's outputs for the rows, then for padding; the next run overwrites them.

        sampling_rows: float64 [n, 5] of the first n rows; the others keep values of earlier
        batches. last_ids: int64, of the step before, where rows have sources. Raises ValueError for
        a slot that is out of range or named twice.
        """
        slots = rows.slots
        if len({*slots}) != len(slots) or min(slots) < 0 or max(slots) >= self._num_slots:
            check_state_indices(slots, self._num_slots)
        return self._graph_for(len(slots)).run(rows, sampling_rows, last_ids)

    def replay_of(self, num_rows: int) -> Callable[[], T]:
        """The graph that such a batch runs in, with the inputs of its last run."""
        return self._graph_for(num_rows).replay

    def _graph_for(self, num_rows: int) -> "_Graph[T]":
        return self._graph(next(size for size in self.sizes() if size >= num_rows))

    def _graph(self, size: int) -> "_Graph[T]":
        if size not in self._graphs:
            self._graphs[size] = _Graph(self._step, size, self._device, self._capture)
        return self._graphs[size]


class _Graph(Generic[T]):
    """The graph for one number of rows, and its input buffers.

    Inputs are int64 words [4 + 5, R], so that one copy brings all of them to the device; the last
    five are viewed as float64. Two host buffers take turns: a step may be prepared while the copy
    of the one before it has not begun. That of the one before that one is done, since its ids have
    been read.
    """

    def __init__(self, step: Step[T], size: int, device: str, capture: Capture[T]) -> None:
        """Captures on padding alone, so that no state changes."""
        is_cuda, num_words = device.startswith("cuda"), _NUM_COLUMNS + len(GREEDY_ROW)
        self._size = size
        self._hosts = [
            torch.zeros(num_words, size, dtype=torch.int64, pin_memory=is_cuda) for _ in range(2)
        ]
        for host in self._hosts:
            host[_NUM_COLUMNS:].view(torch.float64)[:] = torch.tensor(GREEDY_ROW).unsqueeze(-1)
        self._words = torch.empty_like(self._hosts[0], device=device)
        self._fill(DecodeRows([], [], []), None, None)
        self.replay = capture(lambda: step(*_step_inputs(self._words)))

    def run(
        self,
        rows: DecodeRows,
        sampling_rows: "NDArray[np.float64] | None",
        last_ids: Tensor | None,
    ) -> T:
        self._fill(rows, sampling_rows, last_ids)
        return self.replay()

    def _fill(
        self,
        rows: DecodeRows,
        sampling_rows: "NDArray[np.float64] | None",
        last_ids: Tensor | None,
    ) -> None:
        """Copy the inputs to the device."""
        self._hosts.reverse()
        words, num_rows = self._hosts[0].numpy(), len(rows.ids)
        words[:_NUM_COLUMNS, num_rows:] = [[0], [0], [PADDING_SLOT], [-1]]
        for word, column in zip(words, rows, strict=False):
            if column is not None:
                word[:num_rows] = column
        if sampling_rows is not None:
            values = words[_NUM_COLUMNS:].view("float64")
            values[:, : len(sampling_rows)] = sampling_rows.T
        self._words.copy_(self._hosts[0], non_blocking=True)
        if last_ids is not None:
            ids, _, _, sources = self._words[:_NUM_COLUMNS]
            last = last_ids[sources].clamp_min(0)  # a row that got none ends, but is not out yet
            ids.copy_(torch.where(sources < 0, ids, last))


def _step_inputs(words: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of a `Step`."""
    ids, positions, slots, _ = words[:_NUM_COLUMNS]
    return ids, positions, slots.int(), words[_NUM_COLUMNS:].view(torch.float64).T


class CudaCapture:
    """Captures into CUDA graphs that share one memory pool, because no two run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._side_stream = torch.cuda.Stream()  # only one: libraries allocate memory per stream

    def __call__(self, function: Callable[[], T]) -> Callable[[], T]:
        """Run the function once without capture, so that libraries initialize; then capture it."""
        self._side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side_stream):
            function()
        torch.cuda.current_stream().wait_stream(self._side_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = function()
        return Captured(graph, function, outputs)


class Captured(Generic[T]):
    """A graph, and the function that owns the tensors it uses: they must live as long."""

    def __init__(self, graph: torch.cuda.CUDAGraph, function: Callable[[], T], outputs: T) -> None:
        self._graph = graph
        self._function = function
        self._outputs = outputs

    def __call__(self) -> T:
        self._graph.replay()
        return self._outputs


Decode = Callable[[Tensor, Tensor, Tensor], Tensor]
"""ids and positions int64 [R], slots int32 [R] → logits float32 [R, N]; advances the states."""


class IdsOnTheWay:
    """Ids that are copied to the host once the device has them, as `TokenIds`."""

    def __init__(self, ids: Tensor, host: Tensor) -> None:
        """Begin the copy of `ids` int64 [R] to `host`, pinned where it is of another device."""
        self._host = host[: len(ids)]
        self._host.copy_(ids, non_blocking=True)
        self._is_there: torch.cuda.Event | None = None
        if ids.is_cuda:
            self._is_there = torch.cuda.Event()
            self._is_there.record()

    def tolist(self) -> list[int]:
        if self._is_there is not None:
            self._is_there.synchronize()
        ids: list[int] = self._host.tolist()
        return ids


class Decoded(NamedTuple):
    """A step's ids, one for each row that was to be sampled, and its logits float32 [R, N].

    The next step overwrites the logits.
    """

    token_ids: IdsOnTheWay
    logits: Tensor


class CapturedDecode:
    """One token of each row and the ids that follow, with one launch and one copy to the host.

    Every row is sampled in the graph, from its logits as they are. Penalties, biases, masked ids
    and log-probabilities need tensors of other sizes in every step: rows that ask for any of them
    are sampled again, from the logits, which all graphs leave in one tensor.
    """

    def __init__(
        self,
        decode: Decode,
        sampler: Sampler,
        num_rows: int,
        device: str,
        capture: Capture[Any] | None = None,
    ) -> None:
        """Graphs for a pool of `num_rows`; `capture` None is CudaCapture."""
        capture = capture or CudaCapture()
        self._decode = decode
        self._sampler = sampler
        self._graphs = {
            mode: DecodeGraphs(partial(self._step, mode), num_rows, device, capture)
            for mode in SamplingMode
        }
        self.max_rows = self._graphs[SamplingMode.GREEDY].max_rows
        self._logits = torch.empty(self.max_rows, sampler.vocab_size, device=device)
        is_cuda = device.startswith("cuda")
        self._host_ids = [
            torch.empty(self.max_rows, dtype=torch.int64, pin_memory=is_cuda) for _ in range(2)
        ]
        self._last_ids: Tensor | None = None

    def warm_up(self) -> None:
        """Capture every graph, those that need most memory first: the others reuse it."""
        for mode in sorted(SamplingMode, reverse=True):
            self._graphs[mode].warm_up()

    def graphs(self, mode: SamplingMode) -> DecodeGraphs[Tensor]:
        """Those that sample in a mode."""
        return self._graphs[mode]

    def run(
        self, rows: DecodeRows, sampling_rows: "NDArray[np.float64]", mode: SamplingMode
    ) -> Decoded:
        """An id for each of the first rows, as many as there are sampling rows, float64 [n, 5].

        mode: one that is enough for all of them. Returns before the device has computed anything;
        at most one later run may begin before the ids are read. Raises ValueError for a slot that
        is out of range or named twice.
        """
        last_ids = None if rows.sources is None else self._last_ids
        given = None if mode is SamplingMode.GREEDY else sampling_rows
        self._last_ids = self._graphs[mode].run(rows, given, last_ids)
        self._host_ids.reverse()
        token_ids = IdsOnTheWay(self._last_ids[: len(sampling_rows)], self._host_ids[0])
        return Decoded(token_ids, self._logits)

    def _step(
        self,
        mode: SamplingMode,
        ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        sampling_rows: Tensor,
    ) -> Tensor:
        logits = self._decode(ids, positions, slots)
        self._logits[: len(logits)] = logits
        self._sampler.mask(logits)
        return sample_ids(logits, ops.argmax(logits), sampling_rows, mode)

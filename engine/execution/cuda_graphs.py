"""Decode steps as captured graphs: one graph for each batch size and sampling mode.

`DecodeGraphs` keeps the input buffers and pads a batch to a graph's size; `CapturedDecode` samples
in the graph, and after it where a row's sampling needs more than a graph computes.

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
from cottention.engine.sampling.sampler import Sampler, SamplingInput, as_sampled_token
from cottention.engine.sampling.topk_topp import (
    GREEDY_ROW,
    SamplingMode,
    SamplingRow,
    as_tensor,
    sample_ids,
)

MAX_ROWS = 512
"""In larger batches launches take no time of their own, and a graph's logits are hundreds of MB."""

_SMALL_SIZES = (1, 2, 4, 8, 16, 32, 64)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Row(NamedTuple):
    """One token: its id, its position and the pool's row of its state."""

    id: int
    position: int
    slot: int


_PADDING = Row(0, 0, PADDING_SLOT)


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

    def run(self, rows: Sequence[Row], sampling_rows: Sequence[SamplingRow] = ()) -> T:
        """The step's outputs for the rows, then for padding; the next run overwrites them.

        `sampling_rows` are those of the first rows; the others keep values of earlier batches.
        Raises ValueError for a slot that is out of range or named twice.
        """
        check_state_indices([row.slot for row in rows], self._num_slots)
        size = next(size for size in self.sizes() if size >= len(rows))
        return self._graph(size).run(rows, sampling_rows)

    def _graph(self, size: int) -> "_Graph[T]":
        if size not in self._graphs:
            self._graphs[size] = _Graph(self._step, size, self._device, self._capture)
        return self._graphs[size]


class _Graph(Generic[T]):
    """The graph for one number of rows, and its input buffers.

    Inputs are int64 words [3 + 5, R], so that one copy brings all of them to the device; the last
    five are viewed as float64.
    """

    def __init__(self, step: Step[T], size: int, device: str, capture: Capture[T]) -> None:
        """Captures on padding alone, so that no state changes."""
        is_cuda = device.startswith("cuda")
        self._size = size
        num_words = len(_PADDING) + len(GREEDY_ROW)
        self._host = torch.empty(num_words, size, dtype=torch.int64, pin_memory=is_cuda)
        self._words = torch.empty_like(self._host, device=device)
        self._fill([], [GREEDY_ROW] * size)
        self._replay = capture(lambda: step(*_step_inputs(self._words)))

    def run(self, rows: Sequence[Row], sampling_rows: Sequence[SamplingRow]) -> T:
        self._fill(rows, sampling_rows)
        return self._replay()

    def _fill(self, rows: Sequence[Row], sampling_rows: Sequence[SamplingRow]) -> None:
        """Copy the inputs to the device.

        The host buffer is free: reading the last outputs has waited for the copy before.
        """
        padded = [*rows, *[_PADDING] * (self._size - len(rows))]
        self._host[: len(_PADDING)] = torch.tensor(padded).T
        if sampling_rows:
            _sampling_rows(self._host)[:, : len(sampling_rows)] = as_tensor(sampling_rows).T
        self._words.copy_(self._host, non_blocking=True)


def _sampling_rows(words: Tensor) -> Tensor:
    """The last five of the words [3 + 5, R], as float64 [5, R]."""
    return words[len(_PADDING) :].view(torch.float64)


def _step_inputs(words: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of a `Step`."""
    ids, positions, slots = words[: len(_PADDING)]
    return ids, positions, slots.int(), _sampling_rows(words).T


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


class GreedyOutputs(NamedTuple):
    """Logits float32 [R, N] and the ids of their maxima int64 [R]."""

    logits: Tensor
    argmax_ids: Tensor


class CapturedDecode:
    """One token of each row and the ids that follow, with one launch and one copy to the host.

    Greedy and random rows are sampled in the graph. Penalties, biases, masked ids and
    log-probabilities need tensors of other sizes in every step: where a row asks for any of them
    the graph ends with the logits, and all rows are sampled after it.
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
        self._greedy_graphs = DecodeGraphs(self._greedy_step, num_rows, device, capture)
        self._random_graphs = {
            mode: DecodeGraphs(partial(self._random_step, mode), num_rows, device, capture)
            for mode in (SamplingMode.TOP_K_TOP_P, SamplingMode.RANDOM)
        }
        self.max_rows = self._greedy_graphs.max_rows

    def warm_up(self) -> None:
        """Capture every graph, those that need most memory first: the others reuse it.

        Their outputs are not shared; logits take 4·N bytes for each row of each graph.
        """
        for graphs in self._random_graphs.values():
            graphs.warm_up()
        self._greedy_graphs.warm_up()

    def run(
        self, rows: Sequence[Row], inputs: Sequence[SamplingInput]
    ) -> list[SampledToken | None]:
        """An id for each of the first rows, as many as there are sampling inputs.

        Raises ValueError for a slot that is out of range or named twice.
        """
        if any(each.needs_logits for each in inputs):
            logits = self._greedy_graphs.run(rows).logits
            return self._sampler.sample(logits[: len(inputs)], inputs)
        sampling_rows = [each.sampling_row for each in inputs]
        mode = max((row.mode for row in sampling_rows), default=SamplingMode.GREEDY)
        if mode is SamplingMode.GREEDY:
            ids = self._greedy_graphs.run(rows).argmax_ids
        else:
            ids = self._random_graphs[mode].run(rows, sampling_rows)
        return [as_sampled_token(token_id) for token_id in ids[: len(inputs)].tolist()]

    def logits(self, rows: Sequence[Row]) -> Tensor:
        """Logits of the rows and of padding, float32 [R, N]; the next run overwrites them.

        Raises ValueError for a slot that is out of range or named twice.
        """
        outputs: GreedyOutputs = self._greedy_graphs.run(rows)
        return outputs.logits

    def _greedy_step(
        self, ids: Tensor, positions: Tensor, slots: Tensor, _sampling_rows: Tensor
    ) -> GreedyOutputs:
        logits = self._decode(ids, positions, slots)
        return GreedyOutputs(logits, ops.argmax(self._sampler.mask_unsampleable(logits)))

    def _random_step(
        self,
        mode: SamplingMode,
        ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        sampling_rows: Tensor,
    ) -> Tensor:
        logits = self._sampler.mask_unsampleable(self._decode(ids, positions, slots))
        return sample_ids(logits, ops.argmax(logits), sampling_rows, mode)

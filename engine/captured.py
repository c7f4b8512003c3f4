"""Decode in captured graphs, from ids to drawn ids: a set of graphs for each way of drawing.

Owns which set takes a batch, and what is left to do after a graph for rows that want what none
computes. Knows no requests and no state.

Letters: R rows of a graph, N vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from cottention.engine import ops
from cottention.engine.drawing import Way, draw_ids
from cottention.engine.graphs import Capture, CudaCapture, DecodeGraphs, Row
from cottention.engine.sampler import Draw, Drawn, Sampler, as_drawn
from torch import Tensor

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
            for way in (Way.FROM_FIRST, Way.FROM_ALL)
        }
        self.max_rows = self._likeliest.max_rows

    def warm_up(self) -> None:
        """Capture every graph, those that need most memory first: the others then work in it.

        Their outputs are not shared; logits are 4·N bytes for each row of each graph.
        """
        for graphs in self._by_chance.values():
            graphs.warm_up()
        self._likeliest.warm_up()

    def run(self, rows: Sequence[Row], draws: Sequence[Draw]) -> list[Drawn | None]:
        """An id for each of the first rows, as many as there are draws.

        Raises ValueError for a slot that is out of range or named twice.
        """
        if any(draw.wants_logits for draw in draws):
            logits = self._likeliest.run(rows).logits
            return self._sampler.sample(logits[: len(draws)], draws)
        way = max((draw.wish.way for draw in draws), default=Way.LIKELIEST)
        if way is Way.LIKELIEST:
            ids = self._likeliest.run(rows).ids
        else:
            ids = self._by_chance[way].run(rows, [draw.wish for draw in draws])
        return [as_drawn(token_id) for token_id in ids[: len(draws)].tolist()]

    def _likeliest_ids(
        self, ids: Tensor, positions: Tensor, slots: Tensor, _wishes: Tensor
    ) -> Likeliest:
        logits = self._decode(ids, positions, slots)
        return Likeliest(logits, ops.likeliest(self._sampler.possible(logits)))

    def _drawn_ids(
        self, way: Way, ids: Tensor, positions: Tensor, slots: Tensor, wishes: Tensor
    ) -> Tensor:
        logits = self._sampler.possible(self._decode(ids, positions, slots))
        return draw_ids(logits, ops.likeliest(logits), wishes, way)

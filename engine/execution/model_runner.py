"""A plan to tensors, through the model, to sampled ids. Knows no queue, no text and no socket.

Rows before a step: those that begin are cleared, and where a context ends its spare takes over.

Owns when that happens. Does not know what is computed, nor who decided who runs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.execution.cuda_graphs import CapturedDecode, Row
from cottention.engine.models.attention import Recurrence
from cottention.engine.models.inference import ServedModel
from cottention.engine.outputs import SampledToken, TokenLogprob
from cottention.engine.sampling.logprobs import score
from cottention.engine.sampling.sampler import Draw, Sampler, uniform
from cottention.engine.scheduling.batch import Batch, BatchResult, Sample
from cottention.engine.scheduling.request import Choice, Request
from cottention.engine.state.pool import StatePool


class Segment(NamedTuple):
    """Consecutive ids of one sequence: where its state is and the first id's position in it."""

    row: int
    ids: Sequence[int]
    position: int


class Wanted(NamedTuple):
    """A row of hidden states whose next id is to be drawn, and that id's place in its sequence."""

    row: int
    choice: Choice
    token_index: int


class ModelRunner:
    """Runs one plan at a time on the pool's rows; on CUDA, a plan of decode alone in a graph."""

    def __init__(self, model: ServedModel, pool: StatePool, sampler: Sampler, device: str) -> None:
        self._model = model
        self._pool = pool
        self._sampler = sampler
        self._device = device
        self._max_recurrent_tokens = ops.max_recurrent_tokens(
            device, pool.spec.key_width, pool.spec.value_width
        )
        self._captured: CapturedDecode | None = None
        if device.startswith("cuda"):
            self._captured = CapturedDecode(self._decode, sampler, pool.num_rows, device)

    @torch.inference_mode()
    def run(self, plan: Batch) -> BatchResult:
        """Advance every state of the plan; draw an id for each choice whose context is complete."""
        prepare(plan, self._pool)
        segments = _segments(plan)
        if self._captured is not None and _is_one_token_each(plan, self._captured.max_rows):
            return _run_captured(plan, segments, self._captured)
        hidden = self._hidden(segments)
        share_prompts(plan, self._pool)
        scores = self._scores(hidden, plan)
        wanted = _wanted(plan)
        if not wanted:
            return BatchResult([], [], scores)
        logits = self._model.logits(hidden[[place.row for place in wanted]])
        drawn = self._sampler.sample(logits, [_draw(place) for place in wanted])
        return _result(wanted, drawn, scores)

    def _decode(self, ids: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """One token of each slot, as captured: logits float32 [R, vocab_size]."""
        recurrence = Recurrence(self._pool.state, self._pool.z, ops.Segments(slots))
        return self._model.logits(self._model.hidden(ids, positions, recurrence))

    @torch.inference_mode()
    def warm_up(self) -> None:
        """One step on padding alone: libraries load and threads start before the first request."""
        self._model.logits(self._hidden([Segment(ops.PADDING_SLOT, [0], 0)]))
        if self._captured is not None:
            self._captured.warm_up()

    def _hidden(self, segments: Sequence[Segment]) -> Tensor:
        """Hidden states [N, C] of all ids of the segments, in order; their states move on."""
        ids = [token_id for segment in segments for token_id in segment.ids]
        positions = [segment.position + i for segment in segments for i in range(len(segment.ids))]
        recurrence = self._recurrence(segments)
        return self._model.hidden(self._tensor(ids), self._tensor(positions), recurrence)

    def _recurrence(self, segments: Sequence[Segment]) -> Recurrence:
        """The rows of these segments."""
        rows = [segment.row for segment in segments]
        lengths = [len(segment.ids) for segment in segments]
        most, limit = self._pool.num_rows, self._max_recurrent_tokens
        made = ops.Segments.of(rows, lengths, most, self._device, max_recurrent_tokens=limit)
        return Recurrence(self._pool.state, self._pool.z, made)

    def _scores(self, hidden: Tensor, plan: Batch) -> dict[Request, list[TokenLogprob]]:
        """How likely the model held the ids that follow those of each chunk that is scored."""
        scores: dict[Request, list[TokenLogprob]] = {}
        row = sum(len(choice.pending) for choice in plan.decode)
        for chunk in plan.prefill:
            num_top = chunk.request.params.prompt_logprobs
            first = max(chunk.start, chunk.read.scored_from)
            if num_top is not None and first < chunk.stop and not chunk.read.is_spare:
                following = chunk.request.ids_at(first + 1, chunk.stop + 1)
                begin = row + first - chunk.start
                rows = hidden[begin : begin + len(following)]
                scores[chunk.request] = score(self._model.logits(rows), following, num_top)
            row += chunk.stop - chunk.start
        return scores

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=self._device)


def _run_captured(
    plan: Batch, segments: Sequence[Segment], captured: CapturedDecode
) -> BatchResult:
    """One id for each choice."""
    wanted = _wanted(plan)
    rows = [Row(one.ids[0], one.position, one.row) for one in segments]
    return _result(wanted, captured.run(rows, [_draw(place) for place in wanted]), {})


def _is_one_token_each(plan: Batch, max_rows: int) -> bool:
    """Whether a plan is what a graph computes."""
    is_short = not plan.prefill and len(plan.decode) + len(plan.ahead) <= max_rows
    return is_short and all(len(choice.pending) == 1 for choice in plan.decode)


def _segments(plan: Batch) -> list[Segment]:
    """Running choices first, then chunks of prompts, as `_wanted` counts on; spare rows last."""
    segments = [
        Segment(c.row, c.pending, c.position - c.request.grid.start(c.position))
        for c in plan.decode
    ]
    for chunk in plan.prefill:
        ids = chunk.request.ids_at(chunk.start, chunk.stop)
        segments.append(Segment(chunk.row, ids, chunk.start - chunk.read.start))
    segments += [Segment(c.spare, c.pending, c.position - start) for c, start in plan.ahead]
    return segments


def _wanted(plan: Batch) -> list[Wanted]:
    """Rows whose next id is to be drawn: of running choices, and the last of complete prompts."""
    wanted = []
    row = 0
    for choice in plan.decode:
        row += len(choice.pending)
        wanted.append(Wanted(row - 1, choice, choice.position + len(choice.pending)))
    for chunk in plan.prefill:
        row += chunk.stop - chunk.start
        if chunk.is_last and chunk.request.params.max_tokens:
            wanted += [Wanted(row - 1, choice, chunk.stop) for choice in chunk.request.choices]
    return wanted


def _result(
    wanted: Sequence[Wanted],
    drawn: Sequence[SampledToken | None],
    scores: dict[Request, list[TokenLogprob]],
) -> BatchResult:
    pairs = [(place.choice, one) for place, one in zip(wanted, drawn, strict=True)]
    samples = [Sample(choice, one) for choice, one in pairs if one is not None]
    return BatchResult(samples, [choice for choice, one in pairs if one is None], scores)


def _draw(place: Wanted) -> Draw:
    choice, request = place.choice, place.choice.request
    params = request.params
    chance = 0.0 if params.is_greedy else uniform(request.seed, choice.index, place.token_index)
    return Draw(params, chance, choice.history.counts, choice.masked_token_ids())


def prepare(plan: Batch, pool: StatePool) -> None:
    """Make every row of the plan what its ids are to be fed to."""
    for choice in plan.decode:
        grid, position = choice.request.grid, choice.position
        if grid.start(position) != grid.start(position - 1):
            choice.rows.reverse()  # the spare has had all from where the new context starts
    for choice, start in plan.ahead:
        if start == choice.position:
            pool.clear(choice.spare)
    for chunk in plan.prefill:
        if chunk.start == chunk.read.start:
            pool.clear(chunk.row)


def share_prompts(plan: Batch, pool: StatePool) -> None:
    """Where a prompt is complete, the request's other choices get its rows."""
    for chunk in plan.prefill:
        if chunk.is_last:
            pairs = zip(*(choice.rows for choice in chunk.request.choices), strict=True)
            for first, *others in pairs:
                pool.copy(first, others)

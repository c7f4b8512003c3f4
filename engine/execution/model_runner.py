"""A batch to sampled ids: rows prepared, the model run, an id sampled for each complete context."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.execution.cuda_graphs import CapturedDecode, Row
from cottention.engine.models.family import EmbeddingModel, ServedModel
from cottention.engine.models.recurrence import Recurrence
from cottention.engine.outputs import SampledToken, TokenLogprob
from cottention.engine.sampling.logprobs import gather_logprobs
from cottention.engine.sampling.pooling import Pooler
from cottention.engine.sampling.sampler import Sampler, SamplingInput, uniform
from cottention.engine.scheduling.batch import Batch, BatchResult, Sample
from cottention.engine.scheduling.request import Choice, Request
from cottention.engine.state.pool import StatePool


class Segment(NamedTuple):
    """Consecutive ids of one sequence, the row of their state, and the first id's position."""

    row: int
    ids: Sequence[int]
    position: int


class SamplingTarget(NamedTuple):
    """A choice to sample for: its row of the hidden states, and the new token's absolute index."""

    hidden_row: int
    choice: Choice
    token_index: int


WaitForMasks = Callable[[Sequence[Choice]], Sequence[Choice]]
"""Takes choices with matchers; waits for their masks, and returns those that are not there."""


def wait_for_all(_: Sequence[Choice]) -> Sequence[Choice]:
    """Nothing is late: each mask is waited for where it is used."""
    return ()


class ModelRunner:
    """Runs batches on the pool's rows; on CUDA, batches that only decode run as a graph."""

    def __init__(
        self,
        model: ServedModel,
        pool: StatePool,
        sampler: Sampler,
        device: str,
        new_pooler: Callable[[], Pooler],
    ) -> None:
        """new_pooler: of one embedding; only an `EmbeddingModel` is asked for any."""
        self._model = model
        self._new_pooler = new_pooler
        self._pool = pool
        self._sampler = sampler
        self._device = device
        self._segment_form = ops.segment_form(device, pool.spec.key_width, pool.spec.value_width)
        self._rows: list[int] = []
        self._row_recurrence: Recurrence | None = None
        self._captured: CapturedDecode | None = None
        if device.startswith("cuda"):
            self._captured = CapturedDecode(self._decode, sampler, pool.num_rows, device)

    @torch.inference_mode()
    def run(self, batch: Batch, wait_for_masks: WaitForMasks = wait_for_all) -> BatchResult:
        """Advance the batch's states; sample an id for each choice whose context is complete.

        wait_for_masks: called while the model's work is done, with the choices that have a grammar.
        Those whose masks are not there when it returns are not sampled: their logits are returned.
        """
        prepare_rows(batch, self._pool)
        if self._captured is None and _is_greedy(batch):
            return self._run_greedy(batch.decode)
        segments = _segments(batch)
        captured = self._captured
        if captured is not None and segments and _is_one_token_each(batch, captured.max_rows):
            if not _has_masks(batch):
                return _run_captured(batch, segments, captured)
            decoded = captured.logits(_captured_rows(segments))[: len(batch.decode)]
            return self._sample(batch, _sampling_targets(batch), decoded, wait_for_masks)
        if not segments:
            return self._sample(batch, [], None, wait_for_masks)
        hidden = self._hidden(segments)
        copy_prompt_states(batch, self._pool)
        prompt_logprobs = self._prompt_logprobs(hidden, batch)
        embeddings = self._embeddings(hidden, batch)
        targets = _sampling_targets(batch)
        logits: Tensor | None = None
        if targets:
            logits = self._model.logits(hidden[[target.hidden_row for target in targets]])
        result = self._sample(batch, targets, logits, wait_for_masks)
        return result._replace(prompt_logprobs=prompt_logprobs, embeddings=embeddings)

    def _sample(
        self,
        batch: Batch,
        targets: Sequence[SamplingTarget],
        logits: Tensor | None,
        wait_for_masks: WaitForMasks,
    ) -> BatchResult:
        """Sample for the targets, logits float32 [R, N], and for the batch's late choices."""
        with_masks = [each.choice for each in targets if each.choice.matcher is not None]
        late = {*wait_for_masks(with_masks)} if with_masks else set()
        late_logits: dict[Choice, Tensor] = {}
        parts = [choice.late_logits for choice in batch.late if choice.late_logits is not None]
        if logits is not None and late:
            places = {target.choice: row for row, target in enumerate(targets)}
            late_logits = {each: logits[places[each] : places[each] + 1].clone() for each in late}
            ready = [row for row, target in enumerate(targets) if target.choice not in late]
            targets, logits = [targets[row] for row in ready], logits[ready]
        targets = [*targets, *(SamplingTarget(-1, each, each.position) for each in batch.late)]
        if not targets:
            return BatchResult([], [], {}, late_logits=late_logits)
        if parts:
            logits = torch.cat(parts if logits is None else [logits, *parts])
        assert logits is not None
        tokens = self._sampler.sample(logits, [_sampling_input(target) for target in targets])
        return _batch_result(targets, tokens)._replace(late_logits=late_logits)

    def _run_greedy(self, choices: Sequence[Choice]) -> BatchResult:
        """As `run` for choices that decode one token each and want the likeliest, nothing else."""
        ids = [choice.pending[0] for choice in choices]
        positions = [
            choice.position - choice.request.context_schedule.start(choice.position)
            for choice in choices
        ]
        recurrence = self._one_token_each([choice.rows[0] for choice in choices])
        hidden = self._model.hidden(self._tensor(ids), self._tensor(positions), recurrence)
        sampled = self._sampler.likeliest(self._model.logits(hidden))
        samples = [
            Sample(choice, SampledToken(token_id, None))
            for choice, token_id in zip(choices, sampled, strict=True)
            if token_id != ops.NO_INDEX
        ]
        unsampled: list[Choice] = []
        if len(samples) < len(choices):
            pairs = zip(choices, sampled, strict=True)
            unsampled = [choice for choice, token_id in pairs if token_id == ops.NO_INDEX]
        return BatchResult(samples, unsampled, {})

    def _decode(self, ids: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """One token of each slot, as captured: logits float32 [R, vocab_size]."""
        delayed = self._pool.delayed
        recurrence = Recurrence(self._pool.tensors, ops.Segments(slots), delayed)
        logits = self._model.logits(self._model.hidden(ids, positions, recurrence))
        if delayed is not None:
            delayed.advance(slots)
        return logits

    @torch.inference_mode()
    def warm_up(self) -> None:
        """One step on padding alone: libraries load and threads start before the first request."""
        self._model.logits(self._hidden([Segment(ops.PADDING_SLOT, [0], 0)]))
        if self._captured is not None:
            self._captured.warm_up()

    def _hidden(self, segments: Sequence[Segment]) -> Tensor:
        """Hidden states [N, C] of all ids of the segments, in order; advances their states."""
        ids = [token_id for segment in segments for token_id in segment.ids]
        positions = [segment.position + i for segment in segments for i in range(len(segment.ids))]
        recurrence = self._recurrence(segments)
        return self._model.hidden(self._tensor(ids), self._tensor(positions), recurrence)

    def _recurrence(self, segments: Sequence[Segment]) -> Recurrence:
        rows = [segment.row for segment in segments]
        lengths = [len(segment.ids) for segment in segments]
        self._pool.settle(rows)
        num_rows, form = self._pool.num_rows, self._segment_form
        packed = ops.Segments.of(rows, lengths, num_rows, self._device, form=form)
        return Recurrence(self._pool.tensors, packed)

    def _one_token_each(self, rows: list[int]) -> Recurrence:
        """That of the step before, where the same rows go on."""
        if self._rows != rows or self._row_recurrence is None:
            packed = ops.Segments.of(rows, [1] * len(rows), self._pool.num_rows, self._device)
            self._rows, self._row_recurrence = rows, Recurrence(self._pool.tensors, packed)
        return self._row_recurrence

    def _prompt_logprobs(self, hidden: Tensor, batch: Batch) -> dict[Request, list[TokenLogprob]]:
        """Log-probabilities of the prompt ids that follow those of each chunk that is scored."""
        prompt_logprobs: dict[Request, list[TokenLogprob]] = {}
        row = sum(len(choice.pending) for choice in batch.decode)
        for chunk in batch.prefill:
            num_top = chunk.request.params.prompt_logprobs
            first = max(chunk.start, chunk.span.scored_from)
            if num_top is not None and first < chunk.stop and not chunk.span.is_spare:
                next_ids = chunk.request.ids_at(first + 1, chunk.stop + 1)
                begin = row + first - chunk.start
                logits = self._model.logits(hidden[begin : begin + len(next_ids)])
                prompt_logprobs[chunk.request] = gather_logprobs(logits, next_ids, num_top)
            row += chunk.stop - chunk.start
        return prompt_logprobs

    def _embeddings(self, hidden: Tensor, batch: Batch) -> dict[Request, bytes]:
        """Pool the hidden states of each chunk whose request asks for an embedding.

        Returns those of complete prompts. An id that several contexts have counts once.
        """
        embeddings: dict[Request, bytes] = {}
        row = sum(len(choice.pending) for choice in batch.decode)
        for chunk in batch.prefill:
            request, num_rows = chunk.request, chunk.stop - chunk.start
            first = max(chunk.start, chunk.span.scored_from)
            if request.params.encode is not None and first < chunk.stop:
                request.pooler = request.pooler or self._new_pooler()
                rows = hidden[row + first - chunk.start : row + num_rows]
                request.pooler.add(cast(EmbeddingModel, self._model).last_hidden(rows))
            if request.pooler is not None and chunk.is_last:
                embeddings[request] = request.pooler.result()
            row += num_rows
        return embeddings

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=self._device)


def _run_captured(
    batch: Batch, segments: Sequence[Segment], captured: CapturedDecode
) -> BatchResult:
    """One id for each choice."""
    targets = _sampling_targets(batch)
    inputs = [_sampling_input(target) for target in targets]
    return _batch_result(targets, captured.run(_captured_rows(segments), inputs))


def _captured_rows(segments: Sequence[Segment]) -> list[Row]:
    return [Row(segment.ids[0], segment.position, segment.row) for segment in segments]


def _has_masks(batch: Batch) -> bool:
    """Whether any of its choices has a grammar."""
    prompts = (chunk.request.params for chunk in batch.prefill)
    choices = [*batch.decode, *batch.late]
    has_some = any(choice.matcher is not None for choice in choices)
    return has_some or any(params.structured is not None for params in prompts)


def _is_one_token_each(batch: Batch, max_rows: int) -> bool:
    """Whether a graph can compute the batch."""
    is_decode = not batch.prefill and len(batch.decode) + len(batch.lookahead) <= max_rows
    return is_decode and all(len(choice.pending) == 1 for choice in batch.decode)


def _is_greedy(batch: Batch) -> bool:
    """Whether all choices of the batch decode one token each and want the likeliest."""
    if batch.prefill or batch.lookahead or batch.late:
        return False
    return all(choice.is_plain and len(choice.pending) == 1 for choice in batch.decode)


def _segments(batch: Batch) -> list[Segment]:
    """Decoding choices, then prompt chunks, as in `_sampling_targets`; spare rows last."""
    segments = [
        Segment(c.row, c.pending, c.position - c.request.context_schedule.start(c.position))
        for c in batch.decode
    ]
    for chunk in batch.prefill:
        ids = chunk.request.ids_at(chunk.start, chunk.stop)
        segments.append(Segment(chunk.row, ids, chunk.start - chunk.span.start))
    segments += [Segment(c.spare_row, c.pending, c.position - at) for c, at in batch.lookahead]
    return segments


def _sampling_targets(batch: Batch) -> list[SamplingTarget]:
    """Decoding choices, and every choice of the prompts that are complete."""
    targets = []
    row = 0
    for choice in batch.decode:
        row += len(choice.pending)
        targets.append(SamplingTarget(row - 1, choice, choice.position + len(choice.pending)))
    for chunk in batch.prefill:
        row += chunk.stop - chunk.start
        if chunk.is_last and chunk.request.params.max_tokens:
            choices = chunk.request.choices
            targets += [SamplingTarget(row - 1, choice, chunk.stop) for choice in choices]
    return targets


def _batch_result(
    targets: Sequence[SamplingTarget], tokens: Sequence[SampledToken | None]
) -> BatchResult:
    pairs = [(target.choice, token) for target, token in zip(targets, tokens, strict=True)]
    samples = [Sample(choice, token) for choice, token in pairs if token is not None]
    unsampled = [choice for choice, token in pairs if token is None]
    return BatchResult(samples, unsampled, {})


def _sampling_input(target: SamplingTarget) -> SamplingInput:
    """What the sampler needs for the next id; notes whether it needs nothing from now on."""
    sampling_input = _next_sampling_input(target)
    choice = target.choice
    is_fixed = choice.matcher is None and not choice.is_early and not choice.history.matters
    is_greedy = choice.request.params.is_greedy
    choice.is_plain = is_fixed and is_greedy and not sampling_input.needs_logits
    return sampling_input


def _next_sampling_input(target: SamplingTarget) -> SamplingInput:
    choice, request = target.choice, target.choice.request
    params = request.params
    is_random = not params.is_greedy
    number = uniform(request.seed, choice.index, target.token_index) if is_random else 0.0
    matcher, is_early = choice.matcher, choice.is_early
    if matcher is not None and is_early:  # what is complete ends all the same
        is_early = not matcher.is_complete
    return SamplingInput(
        params,
        number,
        choice.history.counts,
        choice.history.ends_of_bad_words(),
        request.constraints,
        is_early,
        None if matcher is None else matcher.mask,
        choice.history.repeat_penalties(),
    )


def prepare_rows(batch: Batch, pool: StatePool) -> None:
    """Swap in spare rows where a context ends, and clear rows that hold no ids yet."""
    for choice in batch.decode:
        schedule, position = choice.request.context_schedule, choice.position
        if schedule.start(position) != schedule.start(position - 1):
            choice.rows.reverse()  # the spare row has all ids from the new context's start on
    for choice, start in batch.lookahead:
        if start == choice.position:
            pool.clear(choice.spare_row)
    for chunk in batch.prefill:
        if chunk.start == chunk.span.start:
            pool.clear(chunk.row)


def copy_prompt_states(batch: Batch, pool: StatePool) -> None:
    """Copy the states of complete prompts to the requests' other choices."""
    for chunk in batch.prefill:
        if chunk.is_last:
            pairs = zip(*(choice.rows for choice in chunk.request.choices), strict=True)
            for first, *others in pairs:
                pool.copy(first, others)

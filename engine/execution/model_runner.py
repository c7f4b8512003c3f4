"""A batch to sampled ids: rows prepared, the model run, an id sampled for each complete context."""

from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.execution.cuda_graphs import CapturedDecode, DecodeRows
from cottention.engine.execution.sampling_rows import SamplingRows
from cottention.engine.execution.warm_up import WAYS_TO_SAMPLE, longest_batches
from cottention.engine.models.family import EmbeddingModel, ServedModel
from cottention.engine.models.recurrence import Recurrence
from cottention.engine.outputs import TokenLogprob
from cottention.engine.sampling.logits_processors import LogitsAdjustment
from cottention.engine.sampling.logprobs import gather_logprobs
from cottention.engine.sampling.pooling import Pooler
from cottention.engine.sampling.sampler import Sampler
from cottention.engine.sampling.token_history import TokenCounts
from cottention.engine.sampling.topk_topp import SamplingMode, SamplingRow, as_tensor
from cottention.engine.scheduling.batch import NO_IDS, Batch, BatchResult
from cottention.engine.scheduling.request import Choice, Request
from cottention.engine.state.pool import StatePool


class Segment(NamedTuple):
    """Consecutive ids of one sequence, the row of their state, and the first id's position."""

    row: int
    ids: Sequence[int]
    position: int


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
        self._slots: Sequence[int] = []
        self._row_recurrence: Recurrence | None = None
        self._sampling_rows, self._asking_rows = SamplingRows(), SamplingRows()
        self._last_decode: Sequence[Choice] = []
        self._captured: CapturedDecode | None = None
        if device.startswith("cuda"):
            self._captured = CapturedDecode(self._decode, sampler, pool.num_rows, device)

    @property
    def max_rows_ahead(self) -> int:
        """Rows of the longest step that may begin before the ids of the one before it are known."""
        return 0 if self._captured is None else self._captured.max_rows

    @torch.inference_mode()
    def run(self, batch: Batch, wait_for_masks: WaitForMasks = wait_for_all) -> BatchResult:
        """Advance the batch's states; sample an id for each choice whose context is complete.

        wait_for_masks: called while the model's work is done, with the choices that have a grammar.
        Those whose masks are not there when it returns are not sampled: their logits are returned.
        The ids may still be on their way from the device; the next batch may be run before they are
        read, and no other.
        """
        prepare_rows(batch, self._pool)
        if batch.prefill or not batch.decode:
            return self._run_mixed(batch, wait_for_masks)
        captured, rows = self._captured, self._decode_rows(batch)
        if captured is not None and len(rows.ids) <= captured.max_rows:
            return self._run_captured(captured, batch, rows, wait_for_masks)
        ids, positions = self._tensor(rows.ids), self._tensor(rows.positions)
        hidden = self._model.hidden(ids, positions, self._one_token_each(rows.slots))
        sampled = hidden[: len(batch.decode)] if batch.lookahead else hidden
        targets = Targets(batch.decode, [index + 1 for index in batch.indices])
        return self._sample(targets, self._model.logits(sampled), batch.late, wait_for_masks)

    def _decode_rows(self, batch: Batch) -> DecodeRows:
        """Those of the decoding choices, then the spare rows."""
        decode, lookahead = batch.decode, batch.lookahead
        positions = [
            index - choice.context for choice, index in zip(decode, batch.indices, strict=True)
        ]
        slots = [choice.rows[0] for choice in decode]
        if not batch.num_ahead:
            ids = [choice.pending[0] for choice in decode]
            sources = None
        else:
            num_known = len(decode) - batch.num_ahead
            ids = [choice.pending[0] for choice in decode[:num_known]] + [0] * batch.num_ahead
            places = {choice: place for place, choice in enumerate(self._last_decode)}
            sources = [-1] * num_known + [places[choice] for choice in decode[num_known:]]
        if lookahead:
            place_of = {choice: place for place, choice in enumerate(decode)}
            places_ahead = [place_of[each.choice] for each in lookahead]
            ids += [ids[place] for place in places_ahead]
            positions += [each.token_index - each.start for each in lookahead]
            slots += [each.choice.spare_row for each in lookahead]
            if sources is not None:
                sources += [sources[place] for place in places_ahead]
        return DecodeRows(ids, positions, slots, sources)

    def _run_captured(
        self,
        captured: CapturedDecode,
        batch: Batch,
        rows: DecodeRows,
        wait_for_masks: WaitForMasks,
    ) -> BatchResult:
        """The ids of a graph; choices that ask for more are sampled again, from its logits."""
        choices, token_indices = batch.decode, [index + 1 for index in batch.indices]
        sampling_rows = self._sampling_rows.of(choices, token_indices)
        decoded = captured.run(rows, sampling_rows, self._sampling_rows.mode)
        self._last_decode = choices
        asking = [row for row, choice in enumerate(choices) if not choice.is_plain]
        if not asking and not batch.late:
            return BatchResult(choices, decoded.token_ids)
        targets = Targets(choices, token_indices).at(asking)
        logits = decoded.logits[asking] if asking else None
        result = self._sample(targets, logits, batch.late, wait_for_masks, self._asking_rows)
        ids = decoded.token_ids.tolist()
        asked = {*asking}
        plain = [row for row in range(len(choices)) if row not in asked]
        return result._replace(
            choices=[*(choices[row] for row in plain), *result.choices],
            token_ids=array("q", [*(ids[row] for row in plain), *result.token_ids.tolist()]),
        )

    def _run_mixed(self, batch: Batch, wait_for_masks: WaitForMasks) -> BatchResult:
        """Decoding choices beside prompts; or choices that wait for nothing but their masks."""
        segments = _segments(batch)
        if not segments:
            return self._sample(Targets([], []), None, batch.late, wait_for_masks)
        hidden = self._hidden(segments)
        copy_prompt_states(batch, self._pool)
        prompt_logprobs = self._prompt_logprobs(hidden, batch)
        embeddings = self._embeddings(hidden, batch)
        rows, targets = _sampling_targets(batch)
        logits = self._model.logits(hidden[rows]) if rows else None
        result = self._sample(targets, logits, batch.late, wait_for_masks)
        return result._replace(prompt_logprobs=prompt_logprobs, embeddings=embeddings)

    def _sample(
        self,
        targets: "Targets",
        logits: Tensor | None,
        late: Sequence[Choice],
        wait_for_masks: WaitForMasks,
        sampling_rows: SamplingRows | None = None,
    ) -> BatchResult:
        """Sample for the targets, logits float32 [R, N], and from the late choices' own logits.

        sampling_rows: keeps those of the targets for the next such call; None: those of a batch.
        """
        late_logits: dict[Choice, Tensor] = {}
        with_masks = [choice for choice in targets.choices if choice.matcher is not None]
        if with_masks and logits is not None and (missing := {*wait_for_masks(with_masks)}):
            ready = [row for row, each in enumerate(targets.choices) if each not in missing]
            for row, each in enumerate(targets.choices):
                if each in missing:
                    late_logits[each] = logits[row : row + 1].clone()
            targets, logits = targets.at(ready), logits[ready]
        if late:
            indices = [*targets.token_indices, *(choice.position for choice in late)]
            targets = Targets([*targets.choices, *late], indices)
            parts = [choice.late_logits for choice in late if choice.late_logits is not None]
            logits = torch.cat(parts if logits is None else [logits, *parts])
        choices = targets.choices
        if not choices or logits is None:
            return BatchResult([], NO_IDS, late_logits=late_logits)
        rows = self._sampling_rows if sampling_rows is None else sampling_rows
        values = rows.of(choices, targets.token_indices)
        adjustments = _adjustments(choices, logits.device)
        if rows.mode is SamplingMode.GREEDY and not adjustments:
            return BatchResult(choices, self._sampler.likeliest(logits), late_logits=late_logits)
        ids, found = self._sampler.sample(logits, torch.from_numpy(values), adjustments)
        logprobs = {choices[row]: logprob for row, logprob in found.items()}
        return BatchResult(choices, ids, logprobs, late_logits=late_logits)

    def _decode(self, ids: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """One token of each slot, as captured: logits float32 [R, vocab_size]."""
        delayed = self._pool.delayed
        recurrence = Recurrence(self._pool.tensors, ops.Segments(slots), delayed)
        logits = self._model.logits(self._model.hidden(ids, positions, recurrence))
        if delayed is not None:
            delayed.advance(slots)
        return logits

    @torch.inference_mode()
    def warm_up(self, max_tokens: int, max_length: int) -> None:
        """A step on padding alone: libraries load and threads start before the first request.

        On a GPU also the longest batches, and every graph that is not captured yet. Not while a
        request has slots.
        """
        self._model.logits(self._hidden([Segment(ops.PADDING_SLOT, [0], 0)]))
        if self._captured is not None and self._pool.num_free == self._pool.num_slots:
            self.run_longest_batches(max_tokens, max_length)
            self._captured.warm_up()

    @torch.inference_mode()
    def run_longest_batches(self, max_tokens: int, max_length: int) -> None:
        """Run and sample `longest_batches` on rows of the pool, which are zero afterwards."""
        num_rows = self._pool.num_rows
        for lengths in longest_batches(num_rows, max_tokens, max_length):
            hidden = self._hidden(
                [Segment(row, [0] * length, 0) for row, length in enumerate(lengths)]
            )
            last = [stop - 1 for stop in accumulate(lengths)]
            for params in WAYS_TO_SAMPLE:
                rows = as_tensor([SamplingRow.of(params, 0.5)] * len(lengths))
                adjusted = LogitsAdjustment(params, TokenCounts())
                adjustments = {0: adjusted} if adjusted else {}
                self._sampler.sample(self._model.logits(hidden[last]), rows, adjustments)
            for row in range(len(lengths)):
                self._pool.clear(row)

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

    def _one_token_each(self, slots: Sequence[int]) -> Recurrence:
        """That of the step before, where the same rows go on."""
        if self._slots != slots or self._row_recurrence is None:
            packed = ops.Segments.of(slots, [1] * len(slots), self._pool.num_rows, self._device)
            self._slots, self._row_recurrence = slots, Recurrence(self._pool.tensors, packed)
        return self._row_recurrence

    def _prompt_logprobs(self, hidden: Tensor, batch: Batch) -> dict[Request, list[TokenLogprob]]:
        """Log-probabilities of the prompt ids that follow those of each chunk that is scored."""
        prompt_logprobs: dict[Request, list[TokenLogprob]] = {}
        row = len(batch.decode)
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
        row = len(batch.decode)
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


def _segments(batch: Batch) -> list[Segment]:
    """Decoding choices, then prompt chunks, as in `_sampling_targets`; spare rows last."""
    segments = [
        Segment(choice.row, choice.pending, index - choice.context)
        for choice, index in zip(batch.decode, batch.indices, strict=True)
    ]
    for chunk in batch.prefill:
        ids = chunk.request.ids_at(chunk.start, chunk.stop)
        segments.append(Segment(chunk.row, ids, chunk.start - chunk.span.start))
    segments += [Segment(c.spare_row, c.pending, i - start) for c, start, i in batch.lookahead]
    return segments


class Targets(NamedTuple):
    """Choices to sample for, and the absolute index of each one's new token."""

    choices: Sequence[Choice]
    token_indices: Sequence[int]

    def at(self, rows: Sequence[int]) -> "Targets":
        """Those of some rows."""
        return Targets([self.choices[i] for i in rows], [self.token_indices[i] for i in rows])


def _sampling_targets(batch: Batch) -> tuple[list[int], Targets]:
    """Decoding choices and every choice of the prompts that are complete, and the rows of the
    hidden states that they are sampled from.
    """
    row = len(batch.decode)
    rows, choices = list(range(row)), [*batch.decode]
    token_indices = [index + 1 for index in batch.indices]
    for chunk in batch.prefill:
        row += chunk.stop - chunk.start
        if chunk.is_last and chunk.request.params.max_tokens:
            more = chunk.request.choices
            choices += more
            rows += [row - 1] * len(more)
            token_indices += [chunk.stop] * len(more)
    return rows, Targets(choices, token_indices)


def _adjustments(choices: Sequence[Choice], device: torch.device) -> dict[int, LogitsAdjustment]:
    """By row, of the choices that want any; notes those that want none from now on."""
    found: dict[int, LogitsAdjustment] = {}
    for row, choice in enumerate(choices):
        if choice.is_plain:
            continue
        adjustment = _adjustment(choice, device)
        if adjustment:
            found[row] = adjustment
        elif choice.matcher is None and not choice.is_early and not choice.history.matters:
            choice.set_plain()
    return found


def _adjustment(choice: Choice, device: torch.device) -> LogitsAdjustment:
    matcher, is_early, history = choice.matcher, choice.is_early, choice.history
    if matcher is not None and is_early:  # what is complete ends all the same
        is_early = not matcher.is_complete
    return LogitsAdjustment(
        choice.request.params,
        history.counts,
        history.ends_of_bad_words(),
        choice.request.constraints.on(device),
        is_early,
        None if matcher is None else matcher.mask,
        history.repeat_penalties(),
    )


def prepare_rows(batch: Batch, pool: StatePool) -> None:
    """Swap in spare rows where a context ends, and clear rows that hold no ids yet."""
    for choice in batch.renewed:
        choice.rows.reverse()  # the spare row has all ids from the new context's start on
    for choice, start, index in batch.lookahead:
        if start == index:
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

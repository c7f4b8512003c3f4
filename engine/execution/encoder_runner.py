"""Texts through an encoder: their streams, two passes a layer in chunks of rows, the answers.

A text in progress takes one stream [N, C] in float32 and a slot of the pool for the state of one
layer. What a chunk needs beside them does not depend on the texts' lengths.

Letters: N tokens of all texts, R rows of a chunk, C channels.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.encoding import Encoded, EncodeParams, MaskPrediction, Pooling
from cottention.engine.models.encoder import EncoderRows, ServedEncoder
from cottention.engine.models.recurrence import Recurrence
from cottention.engine.sampling.pooling import Pooler
from cottention.engine.state.pool import StatePool

MASKS_TOGETHER = 32
"""Masked places whose logits are computed together."""


class EncoderText(NamedTuple):
    """A text's ids, and the pool's row for its state."""

    ids: Sequence[int]
    row: int


class EncoderRunner:
    """Runs texts through an encoder; nothing is kept between them."""

    def __init__(
        self,
        model: ServedEncoder,
        pool: StatePool,
        device: str,
        *,
        token_ids: Sequence[int],
        chunk_tokens: int,
        pooling: Pooling,
        normalize: bool,
    ) -> None:
        """token_ids: those that may be predicted. chunk_tokens: rows that are computed together."""
        self.model = model
        self.pool = pool
        self.device = device
        self.chunk_tokens = chunk_tokens
        self.token_ids = torch.tensor(token_ids, device=device)
        self._pooling: Pooling = pooling
        self._normalize = normalize
        self.segment_form = ops.segment_form(device, pool.spec.key_width, pool.spec.value_width)

    @property
    def passes_per_chunk(self) -> int:
        """How often a chunk of rows is computed until its text is encoded."""
        return 1 + 2 * self.model.num_layers

    def begin(self, texts: Sequence[EncoderText]) -> "Encoding":
        """Start to encode texts together; their streams are allocated."""
        return Encoding(self, texts)

    def answer(self, ids: Sequence[int], stream: Tensor, params: EncodeParams) -> Encoded:
        """What is asked of a text with these ids and these last hidden states [N, C]."""
        with torch.inference_mode():
            if params.mask_id is not None:
                masked = [place for place, each in enumerate(ids) if each == params.mask_id]
                return Encoded(masks=tuple(self._predictions(masked, stream, params)))
            pooler = Pooler(self._pooling, normalize=self._normalize)
            for rows in stream.split(self.chunk_tokens):
                pooler.add(rows)
            return Encoded(embedding=pooler.result())

    def _predictions(
        self, masked: Sequence[int], stream: Tensor, params: EncodeParams
    ) -> Iterator[MaskPrediction]:
        ids = self.token_ids
        if params.targets is not None:
            ids = torch.tensor(params.targets, device=self.device)
        for start in range(0, len(masked), MASKS_TOGETHER):
            places = masked[start : start + MASKS_TOGETHER]
            logits = self.model.predictions(stream[torch.tensor(places, device=self.device)])
            found = logits.softmax(dim=-1)[:, ids].topk(min(params.top_k, len(ids)))
            for place, values, indices in zip(places, *found, strict=True):
                pairs = zip(ids[indices].tolist(), values.tolist(), strict=True)
                yield MaskPrediction(place, tuple(pairs))

    @torch.inference_mode()
    def warm_up(self) -> None:
        """One text of one token: libraries load and threads start before the first request."""
        slot = self.pool.allocate()
        encoding = self.begin([EncoderText([0], slot)])
        encoding.advance(self.passes_per_chunk)
        self.answer([0], encoding.stream_of(0), EncodeParams())
        self.pool.free(slot)


class Encoding:
    """Texts that are encoded together, and how far they are."""

    def __init__(self, runner: EncoderRunner, texts: Sequence[EncoderText]) -> None:
        self._runner = runner
        self._texts = texts
        self._starts = list(accumulate((len(text.ids) for text in texts), initial=0))
        shape = self._starts[-1], runner.model.width
        self._stream = torch.empty(shape, dtype=torch.float32, device=runner.device)
        self._passes = self._run()

    def advance(self, num_passes: int) -> bool:
        """Compute up to this many passes over a chunk each; returns whether that was all."""
        with torch.inference_mode():
            return any(next(self._passes, True) for _ in range(num_passes + 1))

    def stream_of(self, index: int) -> Tensor:
        """Last hidden states [N, C] of one of the texts, once `advance` has returned true."""
        return self._stream[self._starts[index] : self._starts[index + 1]]

    def _run(self) -> Iterator[bool]:
        """Yields false after each pass over a chunk."""
        model, pool = self._runner.model, self._runner.pool
        for chunk in self._chunks():
            chunk.x.copy_(model.embed(chunk.ids(), chunk.positions()))
            yield False
        for layer in range(model.num_layers):
            for text in self._texts:
                pool.clear(text.row)
            for chunk in self._chunks():
                model.accumulate(layer, chunk.x, chunk.rows())
                yield False
            for chunk in self._chunks():
                model.update(layer, chunk.x, chunk.rows())
                yield False

    def _chunks(self) -> Iterator["_Chunk"]:
        size = self._runner.chunk_tokens
        for start in range(0, self._starts[-1], size):
            stop = min(start + size, self._starts[-1])
            yield _Chunk(self._runner, self._stream[start:stop], list(self._pieces(start, stop)))

    def _pieces(self, start: int, stop: int) -> Iterator["_Piece"]:
        for text, first, last in zip(self._texts, self._starts, self._starts[1:], strict=False):
            if first < stop and start < last:
                yield _Piece(text, max(start, first) - first, min(stop, last) - first)


class _Piece(NamedTuple):
    """Tokens start:stop of a text."""

    text: EncoderText
    start: int
    stop: int


class _Chunk(NamedTuple):
    """Rows x [R, C] of the stream, and the pieces of texts that they are."""

    runner: EncoderRunner
    x: Tensor
    pieces: list[_Piece]

    def ids(self) -> Tensor:
        """int64 [R]."""
        ids = [each for text, start, stop in self.pieces for each in text.ids[start:stop]]
        return torch.tensor(ids, device=self.runner.device)

    def positions(self) -> Tensor:
        """int64 [R], from 0 in each text."""
        device = self.runner.device
        return torch.cat([torch.arange(p.start, p.stop, device=device) for p in self.pieces])

    def rows(self) -> EncoderRows:
        """What a pass over the chunk is given."""
        runner = self.runner
        counts = [piece.stop - piece.start for piece in self.pieces]
        lengths = torch.tensor([len(piece.text.ids) for piece in self.pieces])
        segments = ops.Segments.of(
            [piece.text.row for piece in self.pieces],
            counts,
            runner.pool.num_rows,
            runner.device,
            form=runner.segment_form,
        )
        return EncoderRows(
            self.positions(),
            lengths.repeat_interleave(torch.tensor(counts)).to(runner.device),
            Recurrence(runner.pool.tensors, segments),
        )

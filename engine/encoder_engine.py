"""The engine of an encoder: submit and cancel texts, and the step that computes them.

It has the methods of `Engine` that a worker calls. `submit`, `cancel`, `pause`, `resume` and
`stats` may be called from any thread, all else from one.
"""

import logging
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cottention.engine.commands import CommandQueue, failure
from cottention.engine.config import EngineConfig
from cottention.engine.encoding import Capability, Encoded, EncodeParams
from cottention.engine.errors import ParameterError, RequestFailedError
from cottention.engine.execution.device import check_device
from cottention.engine.execution.encoder_loading import STREAM_BYTES, load_encoder
from cottention.engine.execution.encoder_runner import EncoderText, Encoding
from cottention.engine.outputs import EngineStats, FinishReason, Output
from cottention.engine.sampling_params import SamplingParams, out_of_vocabulary
from cottention.engine.scheduling.client import DEFAULT_CLIENT, Client
from cottention.engine.scheduling.encoder_scheduler import EncodeRequest, EncoderScheduler
from cottention.engine.scheduling.prefill_stops import CacheUse
from cottention.engine.state.session_state import SessionState

_log = logging.getLogger(__name__)


class EncoderEngine:
    """An encoder and the texts that are computed with it. It has no sessions."""

    default_sampling_params: Mapping[str, Any] = {}

    def __init__(self, model: str | Path | None = None, config: EngineConfig | None = None) -> None:
        """`model` is a folder or a Hugging Face id.

        Raises ModelFolderError, ConfigurationError or OutOfMemoryError.
        """
        self.config = config or EngineConfig()
        loaded = load_encoder(model, self.config)
        placed, self.tokenizer = loaded.placed, loaded.tokenizer
        self.name, self.device, self.dtype = placed.name, placed.device, placed.dtype
        self.model_config, self.pooling = placed.model_config, loaded.pooling
        self.num_parameters = loaded.num_parameters
        self._runner = loaded.runner
        self.pool = self._runner.pool
        self._scheduler = EncoderScheduler(self.config.max_batch_tokens, loaded.max_long_tokens)
        self._long: dict[EncodeRequest, Encoding] = {}
        self._requests: dict[str, EncodeRequest] = {}
        self._commands = CommandQueue()
        self._reserved_ids: set[str] = set()
        self._num_steps = self._num_faults = self._num_tokens = 0
        self._num_finished: Counter[FinishReason] = Counter()
        self.warm_up()

    def warm_up(self) -> None:
        """As Engine.warm_up."""
        self._runner.warm_up()

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What the model can do."""
        if self._runner.model.has_predictions and self.tokenizer.mask_id is not None:
            return "embeddings", "fill-mask"
        return ("embeddings",)

    @property
    def bytes_per_token(self) -> int:
        """Memory of a token while its text is read."""
        return STREAM_BYTES * self._runner.model.width

    @property
    def max_text_tokens(self) -> int:
        """Tokens of the longest text: of the table of positions, and for which there is memory."""
        in_memory = max(self._scheduler.max_long_tokens, self.config.max_batch_tokens)
        return min(self.model_config.max_exact_length or in_memory, in_memory)

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        start: SessionState | None = None,
        cache: CacheUse | None = None,
        client: Client = DEFAULT_CLIENT,
    ) -> str:
        """Submit a text and get its id; a later step returns its only output.

        `params.encode` says what is asked of it. Clients share the steps by their weights; lower
        `priority` starts first among the texts of one. There is no session and no cache. Raises
        ParameterError for a text or parameters that the engine refuses and for a `request_id` in
        use, EngineStoppedError after `close`.
        """
        del cache
        request_id = request_id or uuid.uuid4().hex
        if params.encode is None or start is not None:
            raise ParameterError(
                "model", "the model is an encoder, which does not generate text and has no sessions"
            )
        self._check(prompt_ids, params.encode)
        request = EncodeRequest(request_id, prompt_ids, params.encode, priority, client)
        self._commands.submit(
            reserve=lambda: self._reserve_id(request_id), add=lambda: self._add(request)
        )
        return request_id

    def _reserve_id(self, request_id: str) -> None:
        if request_id in self._reserved_ids:
            message = "there is an unfinished request of that request_id"
            raise ParameterError("request_id", message)
        self._reserved_ids.add(request_id)

    def cancel(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request in the next step; does nothing if it is unknown or has ended."""
        self._commands.put(lambda: self._cancel(request_id, reason))

    def pause(self, request_id: str) -> None:
        """Nothing: a text has one output, which no reader can be behind with."""

    def resume(self, request_id: str) -> None:
        """Nothing, as `pause`."""

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._commands) or self._scheduler.has_work()

    def step(self) -> list[Output]:
        """Execute what was submitted or cancelled, then compute a batch and a part of a long text.

        The part is as many passes as a whole text of one chunk takes, so that a step takes about
        two batches' time, however long a text is.
        """
        outputs = self._commands.run()
        self._admit_long()
        batch = self._scheduler.take_short(self.pool.num_free)
        if batch:
            outputs += self._compute_batch(batch)
        request = self._scheduler.next_long()
        if request is not None:
            outputs += self._compute_part(request)
        self._num_steps += bool(batch or request)
        return outputs

    def close(self) -> list[Output]:
        """Refuse new requests and cancel all others; returns the last outputs."""
        self._commands.close()
        outputs = self._commands.run()
        for request_id in list(self._requests):
            outputs += self._cancel(request_id, FinishReason.ABORT)
        return outputs

    def encode(
        self, texts: Sequence[str | Sequence[int]], params: EncodeParams | None = None
    ) -> list[Encoded]:
        """What is asked of each text, in this thread; by default its embedding.

        A string gets the tokenizer's special tokens, ids are taken as they are. Raises
        ParameterError, and RequestFailedError where the engine failed on a text.
        """
        asked = SamplingParams(max_tokens=0, encode=params or EncodeParams())
        ids = [
            self.tokenizer.framed(self.tokenizer.encode(text)) if isinstance(text, str) else text
            for text in texts
        ]
        names = [self.submit(each, asked) for each in ids]
        found: dict[str, Output] = {}
        while len(found) < len(names):
            found |= {output.request_id: output for output in self.step()}
        encoded = [found[name].encoded for name in names]
        if any(each is None for each in encoded):
            raise RequestFailedError("the engine failed on a text")
        return [each for each in encoded if each is not None]

    def stats(self) -> EngineStats:
        """Counters and gauges at this moment."""
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_paused=0,
            num_paused_states=0,
            max_paused_states=0,
            num_finished={reason: self._num_finished[reason] for reason in FinishReason},
            num_prompt_tokens=self._num_tokens,
            num_generated_tokens=0,
            num_steps=self._num_steps,
            num_faults=self._num_faults,
            num_undrawn=0,
            num_slots=self.pool.num_slots,
            num_free_slots=self.pool.num_free,
            pool_bytes=self.pool.nbytes,
            bytes_per_slot=self.pool.spec.bytes_per_slot,
        )

    def _check(self, ids: Sequence[int], params: EncodeParams) -> None:
        """Raise ParameterError for a text that the model cannot read."""
        if not ids:
            raise ParameterError("input", "input must hold at least one token; it is empty")
        if not 0 <= min(ids) <= max(ids) < self.tokenizer.num_ids:
            message = out_of_vocabulary("ids in input", ids, self.tokenizer.num_ids)
            raise ParameterError("input", message)
        if len(ids) > self.max_text_tokens:
            raise ParameterError("input", self.too_long(len(ids)))
        if params.mask_id is None:
            return
        if "fill-mask" not in self.capabilities:
            raise ParameterError("model", "the model has no head or no token for masked words")
        if params.mask_id not in ids:
            raise ParameterError("input", f"input must have the id {params.mask_id} in it: a mask")

    def too_long(self, num_tokens: int) -> str:
        """The message for a text of too many tokens."""
        table = self.model_config.max_exact_length
        why = (
            "the model has no more positions"
            if self.max_text_tokens == table
            else "--encoder-memory has no room for more"
        )
        return (
            f"input must have at most {self.max_text_tokens} tokens, special tokens included:"
            f" {why}; it has {num_tokens}"
        )

    def _add(self, request: EncodeRequest) -> list[Output]:
        self._requests[request.id] = request
        self._scheduler.add(request)
        return []

    def _cancel(self, request_id: str, reason: FinishReason) -> list[Output]:
        request = self._requests.get(request_id)
        return [] if request is None else [self._finish(request, reason)]

    def _admit_long(self) -> None:
        """Start long texts; one slot is left for short ones, unless there is only one."""
        num_slots = self.pool.num_free - (self.pool.num_slots > 1)
        for request in self._scheduler.admit_long(num_slots):
            self._long[request] = self._begin([request])

    def _begin(self, requests: Sequence[EncodeRequest]) -> Encoding:
        texts = []
        for request in requests:
            request.slot = self.pool.allocate()
            request.started = time.monotonic()
            texts.append(EncoderText(request.ids, request.slot))
        return self._runner.begin(texts)

    def _compute_batch(self, batch: Sequence[EncodeRequest]) -> list[Output]:
        try:
            encoding = self._begin(batch)
            encoding.advance(self._runner.passes_per_chunk)
            answers = [
                self._runner.answer(request.ids, encoding.stream_of(place), request.params)
                for place, request in enumerate(batch)
            ]
        except Exception as error:
            return self._fail(batch, error)
        return [
            self._finish(request, FinishReason.STOP, encoded=encoded)
            for request, encoded in zip(batch, answers, strict=True)
        ]

    def _compute_part(self, request: EncodeRequest) -> list[Output]:
        try:
            encoding = self._long[request]
            if not encoding.advance(self._runner.passes_per_chunk):
                return []
            encoded = self._runner.answer(request.ids, encoding.stream_of(0), request.params)
        except Exception as error:
            return self._fail([request], error)
        return [self._finish(request, FinishReason.STOP, encoded=encoded)]

    def _fail(self, requests: Sequence[EncodeRequest], error: Exception) -> list[Output]:
        """End requests after a fault; one of the device is raised, as DeviceFaultError."""
        check_device(self.device, error)
        _log.error("a step failed; its %d texts end with an error", len(requests), exc_info=error)
        self._num_faults += len(requests)
        message = failure(error)
        return [self._finish(request, FinishReason.ERROR, error=message) for request in requests]

    def _finish(
        self,
        request: EncodeRequest,
        reason: FinishReason,
        *,
        encoded: Encoded | None = None,
        error: str | None = None,
    ) -> Output:
        """The only output of a request, which is forgotten."""
        self._scheduler.remove(request)
        self._long.pop(request, None)
        if request.slot is not None:
            self.pool.free(request.slot)
        del self._requests[request.id]
        self._reserved_ids.discard(request.id)
        self._num_finished[reason] += 1
        if encoded is not None:
            self._num_tokens += len(request.ids)
        return Output(
            request.id, 0, "", (), reason, error, started=request.started, encoded=encoded
        )

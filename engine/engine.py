"""The engine: submit and cancel requests, and the step that computes them.

`submit`, `has_grammar`, `cancel`, `pause`, `resume`, `stats` and `num_to_prefill` may be called
from any thread, all else from one.
"""

import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cottention.engine.commands import CommandQueue, failure
from cottention.engine.config import EngineConfig
from cottention.engine.encoding import Capability
from cottention.engine.execution.device import check_device, reserved_memory
from cottention.engine.execution.loading import load
from cottention.engine.grammar.compiler import GrammarCompiler
from cottention.engine.grammar.mask_worker import MaskWorker, SampledRow, wait_for_one
from cottention.engine.grammar.trial import Limits
from cottention.engine.inboxes import OutputInboxes
from cottention.engine.ops import NO_INDEX
from cottention.engine.outputs import Completion, EngineStats, FinishReason, Output
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.scheduling.batch import Batch, BatchResult
from cottention.engine.scheduling.client import DEFAULT_CLIENT, Client
from cottention.engine.scheduling.context_policy import MAX_HELD, ContextPolicies
from cottention.engine.scheduling.input_processor import InputProcessor, Prompt, RequestLimits
from cottention.engine.scheduling.output_processor import OutputProcessor
from cottention.engine.scheduling.preemption import Preemption
from cottention.engine.scheduling.prefill_stops import CacheUse
from cottention.engine.scheduling.prefix_reuse import PrefixReuse
from cottention.engine.scheduling.request import Choice, Request, RequestStatus
from cottention.engine.scheduling.request_manager import RequestManager
from cottention.engine.scheduling.scheduler import Scheduler
from cottention.engine.sessions.fingerprint import Fingerprint
from cottention.engine.sessions.snapshot import SnapshotCodec
from cottention.engine.state.prefix_cache import PrefixCache
from cottention.engine.state.session_state import SessionState
from cottention.engine.structured_output import StructuredOutput

_log = logging.getLogger(__name__)

LATE_WAIT = 0.01
"""Seconds that a step waits for a mask where it has nothing else to do."""

NO_SAMPLE = "no token could be sampled: all are forbidden, or the model's logits are not finite"


class RunningStep(NamedTuple):
    """A batch that has begun, and its result, whose ids may still be computed."""

    batch: Batch
    result: BatchResult


class Engine:
    """A model, its pool of states, and the requests that are computed with them."""

    def __init__(self, model: str | Path | None = None, config: EngineConfig | None = None) -> None:
        """`model` is a folder, a .pth file, a Hugging Face id, or None for the one that ships here.

        Raises ModelFolderError, ConfigurationError or OutOfMemoryError.
        """
        self.config = config or EngineConfig()
        loaded = load(model, self.config)
        placed, self.tokenizer = loaded.placed, loaded.tokenizer
        self.name, self.device, self.dtype = placed.name, placed.device, placed.dtype
        self.model_config, self._folder = placed.model_config, placed.folder
        self.num_parameters = loaded.num_parameters
        self.default_sampling_params = loaded.default_sampling_params
        self.pool, self.spec = loaded.pool, loaded.pool.spec
        self.policies = ContextPolicies.of(self.model_config, loaded.context_policy)
        limits = RequestLimits.of(self.tokenizer, self.pool, self.config)
        ends = self.model_config.reachable_ends
        self._grammars = GrammarCompiler(
            self.tokenizer,
            ends,
            Limits(self.config.grammar_seconds, self.config.grammar_memory),
            self.config.max_grammar_size,
        )
        self._mask_worker = MaskWorker(self.tokenizer.num_ids)
        self._input_processor = InputProcessor(
            self.tokenizer, ends, limits, self.policies, self._grammars
        )
        self._scheduler = Scheduler(
            self.config.max_batch_tokens,
            self.config.prompt_tokens_beside(self.device),
            self.config.num_preempted(self.pool.num_slots),
        )
        self._preemption = Preemption(self.pool, self.config.num_paused(self.pool.num_slots))
        self._prefix_cache = PrefixCache(self.config.prefix_cache_bytes)
        self._request_manager = RequestManager(
            self._scheduler,
            self.pool,
            self._preemption,
            PrefixReuse(self.pool, self._prefix_cache),
            OutputProcessor(self.policies.window),
        )
        self._runner = loaded.runner
        self._commands = CommandQueue()
        self._inboxes = OutputInboxes()
        self._running: RunningStep | None = None
        self._num_steps = self._num_faults = self._num_unsampled = 0
        self.warm_up()

    def warm_up(self) -> None:
        """Compute what comes first in a thread, before the first request: again in the thread that
        is to run the steps, because libraries have a state for each.
        """
        max_tokens = self.config.max_batch_tokens
        self._runner.warm_up(max_tokens, self.model_config.longest_prompt_part(max_tokens))
        if (reserved := reserved_memory(self.device)) is not None:
            _log.info("memory of %s reserved after warm-up: %s bytes", self.device, f"{reserved:,}")

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What the model can do."""
        more: tuple[Capability, ...] = ("embeddings",) if self.config.embeddings else ()
        return ("completions", "chat", "sessions", *more)

    @property
    def max_text_tokens(self) -> int:
        """Tokens of the longest text that can be embedded."""
        return MAX_HELD

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
        replayed: Sequence[int] = (),
    ) -> str:
        """Submit a request and get its id; later steps return its outputs.

        replayed: ids that this turn of `start` has generated before, in another process: with the
        same seed it goes on after them. Its first output has them, without log-probabilities.

        Clients share the slots by their weights, and a request may have to give up its slots for a
        time; of one client's requests those of lower `priority` start first. With `start` the
        prompt continues that session, and the last output has the session's new state. `cache` says
        how the prompt uses the prefix cache, None that it does not. Raises ParameterError for a
        prompt or parameters that the engine refuses and for a `request_id` in use,
        ContextPolicyError for a session whose policy can no longer change, EngineStoppedError after
        `close`.
        """
        request_id = request_id or uuid.uuid4().hex
        request = self._input_processor.build_request(
            request_id, prompt_ids, params, start, replayed
        )
        request.priority, request.client = priority, client
        if cache is not None and self.config.prefix_cache_bytes >= self.spec.bytes_per_row:
            request.enable_prefix_reuse(cache)
        self._commands.submit(
            reserve=lambda: self._request_manager.reserve_id(request_id),
            add=lambda: self._add(request),
        )
        return request_id

    def _add(self, request: Request) -> list[Output]:
        """Queue a new request; its grammar follows the ids that it has generated before."""
        matcher = request.choices[0].matcher
        if matcher is not None and request.replayed:
            *earlier, last = request.replayed
            matcher.native.consume_tokens(earlier)
            row = SampledRow(request.client, matcher, last)
            self._mask_worker.advance([row], is_shared=self._scheduler.is_shared)
        return self._request_manager.add(request)

    def has_grammar(self, structure: StructuredOutput) -> bool:
        """Whether a request of this structure is submitted without compiling anything."""
        return self._grammars.is_kept(structure)

    def cancel(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request in the next step; does nothing if it is unknown or has ended."""
        self._commands.put(lambda: self._request_manager.cancel(request_id, reason))

    def pause(self, request_id: str) -> None:
        """Stop decoding until `resume` and give the slots to others; prefill is not interrupted.

        Above --max-paused-states the requests paused longest end with FinishReason.SLOW_READER.
        """
        self._commands.put(lambda: self._request_manager.pause(request_id))

    def resume(self, request_id: str) -> None:
        """Go on with a paused request as soon as there are slots."""
        self._commands.put(lambda: self._request_manager.resume(request_id))

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._commands) or self._running is not None or self._scheduler.has_work()

    def step(self) -> list[Output]:
        """Execute what was submitted, cancelled or paused, and compute one batch.

        Where the device computes beside this thread, the next batch begins before the outputs of
        this one are made, if it is known by then; commands wait until none is under way. Returns
        at most one output for each choice. Raises DeviceFaultError, after which no step can
        succeed.
        """
        outputs: list[Output] = []
        running, self._running = self._running, None
        if running is None:
            outputs += self._commands.run()
            self._request_manager.admit()
            running = self._begin(self._scheduler.schedule(), outputs)
        if running is not None:
            self._running = self._begin_ahead(running, outputs)
            outputs += self._process(running)
        elif late := self._scheduler.late_choices:
            wait_for_one([each.matcher for each in late if each.matcher is not None], LATE_WAIT)
        return self._inboxes.post(outputs)

    def _run_commands(self) -> list[Output]:
        """Execute what was submitted, cancelled or paused, after the step that is under way."""
        running, self._running = self._running, None
        outputs = [] if running is None else self._process(running)
        return outputs + self._commands.run()

    def _begin(self, batch: Batch, outputs: list[Output]) -> "RunningStep | None":
        """Run a batch; None where there is nothing in it, or a fault has ended its requests."""
        if not batch:
            return None
        try:
            return RunningStep(batch, self._runner.run(batch, self._wait_for_masks))
        except Exception as error:
            outputs += self._fail_batch(batch, error)
            return None

    def _begin_ahead(self, running: "RunningStep", outputs: list[Output]) -> "RunningStep | None":
        """Run the batch after the one that is under way, if it does not depend on its outputs."""
        max_rows = self._runner.max_rows_ahead
        if not max_rows or self._commands:
            return None
        batch = self._scheduler.schedule_ahead(running.batch, self.pool.num_free, max_rows)
        return None if batch is None else self._begin(batch, outputs)

    def _process(self, running: "RunningStep") -> list[Output]:
        """Bring the requests of a batch up to date with its result."""
        batch, result = running
        try:
            token_ids = result.token_ids.tolist()
        except Exception as error:
            return self._fail_batch(batch, error)
        self._num_steps += 1
        self._advance_matchers(result.choices, token_ids)
        outputs = self._request_manager.advance(batch, result)
        unsampled: list[Choice] = []
        logprobs, append_token = result.logprobs, self._request_manager.append_token
        for choice, token_id in zip(result.choices, token_ids, strict=True):
            if choice.finish_reason is not None:  # with another of its request, or a step before
                continue
            if token_id == NO_INDEX:
                unsampled.append(choice)
                continue
            try:
                logprob = logprobs.get(choice) if logprobs else None
                outputs.append(append_token(choice, token_id, logprob))
            except Exception as error:
                _log.exception("failed to process a sampled token; its request ends with an error")
                outputs += self._fail(choice.request, error)
        self._num_unsampled += len(unsampled)
        for choice in unsampled:
            if choice.finish_reason is None:  # else it has ended with another of its request
                error_text = _grammar_error(choice) or NO_SAMPLE
                outputs += self._request_manager.finish(
                    choice.request, FinishReason.ERROR, error_text
                )
        return outputs

    def _advance_matchers(self, choices: Sequence[Choice], token_ids: Sequence[int]) -> None:
        """Begin to compute the masks that the next step's samples need."""
        rows = [
            SampledRow(choice.request.client, choice.matcher, token_id)
            for choice, token_id in zip(choices, token_ids, strict=True)
            if choice.matcher is not None and token_id != NO_INDEX
        ]
        if rows:
            self._mask_worker.advance(rows, is_shared=self._scheduler.is_shared)

    def _wait_for_masks(self, choices: Sequence[Choice]) -> list[Choice]:
        """As WaitForMasks."""
        rows = [(each.request.client, each.matcher) for each in choices if each.matcher is not None]
        late = self._mask_worker.wait(rows, lambda: self._scheduler.is_shared)
        return [choices[place] for place in late]

    def _fail_batch(self, batch: Batch, error: Exception) -> list[Output]:
        """End the requests of a batch that failed. Raises DeviceFaultError."""
        check_device(self.device, error)
        requests = [each for each in batch.requests if each.status is not RequestStatus.FINISHED]
        _log.error(
            "a step failed; its %d requests end with an error", len(requests), exc_info=error
        )
        return [out for request in requests for out in self._fail(request, error)]

    def _fail(self, request: Request, error: Exception) -> list[Output]:
        """End a request after a fault."""
        self._num_faults += 1
        return self._request_manager.finish(request, FinishReason.ERROR, failure(error))

    def close(self) -> list[Output]:
        """Refuse new requests and cancel all others; returns the last outputs."""
        self._commands.close()
        self._mask_worker.close()
        self._grammars.close()
        return self._inboxes.post(self._run_commands() + self._request_manager.cancel_all())

    @property
    def has_one_arithmetic(self) -> bool:
        """Whether equal ids give equal bits, however they are cut into chunks and batches."""
        return self.device == "cpu" and self.dtype in ("float32", "int8")

    def session_codec(
        self, *, writes_recipes: bool = False, max_encoded: int | None = None
    ) -> SnapshotCodec:
        """The codec of this model's session states; reads the model's files for the fingerprint.

        writes_recipes, max_encoded: as in SnapshotCodec.
        """
        fingerprints = Fingerprint.of(self._folder, self.tokenizer.files, self.spec, self.dtype)
        num_ids, window = self.tokenizer.num_ids, self.policies.window
        return SnapshotCodec(
            fingerprints,
            self.spec,
            num_ids,
            self.policies.context_schedules,
            window,
            writes_recipes=writes_recipes,
            max_encoded=max_encoded,
        )

    @property
    def num_to_prefill(self) -> int:
        """Prompt ids of all requests that are still to be prefilled."""
        return self._request_manager.num_to_prefill

    def stats(self) -> EngineStats:
        """Counters and gauges at this moment."""
        finished = self._request_manager.num_finished
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_paused=self._preemption.num_paused,
            num_paused_states=self._preemption.num_states,
            max_paused_states=self._preemption.max_states,
            num_preempted_states=self._preemption.num_preempted_states,
            num_preemptions=self._request_manager.num_preemptions,
            num_finished={reason: finished[reason] for reason in FinishReason},
            num_prompt_tokens=self._request_manager.num_prompt_tokens,
            num_generated_tokens=self._request_manager.num_generated_tokens,
            num_steps=self._num_steps,
            num_faults=self._num_faults,
            num_undrawn=self._num_unsampled,
            num_slots=self.pool.num_slots,
            num_free_slots=self.pool.num_free,
            pool_bytes=self.pool.nbytes,
            bytes_per_slot=self.spec.bytes_per_slot,
            prefix_cache=self._prefix_cache.stats(),
        )

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[Output]:
        """Generate in this thread and yield outputs as they come; closing the iterator cancels.

        on_prefill: takes the number of the prompt's ids that have been prefilled, and of all, after
        each step but the last of its prefill.
        """
        prompts = {uuid.uuid4().hex: self._input_processor.tokenize(prompt)}
        yield from self._generate(prompts, params or self._default_params(), on_prefill)

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Generate for all prompts in one batch, in this thread: n completions each, in order.

        Raises RequestFailedError where a request ended with an error.
        """
        params = params or self._default_params()
        prompt_ids = {uuid.uuid4().hex: self._input_processor.tokenize(each) for each in prompts}
        parts: dict[tuple[str, int], list[Output]] = {
            (request_id, index): [] for request_id in prompt_ids for index in range(params.n)
        }
        for output in self._generate(prompt_ids, params):
            parts[output.request_id, output.choice].append(output)
        return [Completion.of(outputs) for outputs in parts.values()]

    def _default_params(self) -> SamplingParams:
        """Of a call that gives none: the model's own where it has some."""
        return SamplingParams(**self.default_sampling_params)

    def _generate(
        self,
        prompts: Mapping[str, Sequence[int]],
        params: SamplingParams,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[Output]:
        """Outputs of prompts by request id, stepping until they end."""
        inbox = self._inboxes.open(prompts)
        try:
            for request_id, prompt_ids in prompts.items():
                self.submit(prompt_ids, params, request_id=request_id)
            num_unfinished = len(prompts) * params.n
            while num_unfinished:
                self.step()
                if on_prefill is not None and self.num_to_prefill:
                    total = max(self.num_to_prefill, sum(map(len, prompts.values())))
                    on_prefill(total - self.num_to_prefill, total)
                while inbox:  # steps of other iterators fill it, too
                    output = inbox.popleft()
                    num_unfinished -= output.finish_reason is not None
                    yield output
        finally:
            self._inboxes.close(prompts)
            for request_id in prompts:
                self.cancel(request_id)
            self._inboxes.post(self._run_commands())


def _grammar_error(choice: Choice) -> str:
    """Why a choice's grammar cannot be followed any further; empty where it can."""
    found = "" if choice.matcher is None else choice.matcher.error
    return found and f"the grammar cannot be followed any further: {found}"

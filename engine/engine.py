"""The engine: its verbs and its step.

Owns the way in: commands from any thread. A step is `stepper.py`'s. Knows no asyncio and no HTTP:
`submit`, `cancel` and `stats` may be called from any thread, `step` and `close` from one.

One step of the engine, and its faults.

Owns the order of a step and that a fault ends the requests it touches and nobody else's. Knows no
commands and no threads.

Generating in the caller's own thread: step, and give each follower what is its own.

Owns the inboxes of those who follow requests without an engine thread. Does not know what a step
is.
"""

import logging
import queue
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from cottention.engine.config import EngineConfig
from cottention.engine.errors import EngineStoppedError
from cottention.engine.execution.loading import load
from cottention.engine.execution.model_runner import ModelRunner
from cottention.engine.outputs import Completion, EngineStats, FinishReason, Output
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.scheduling.batch import Batch, Sample
from cottention.engine.scheduling.context_policy import ContextPolicies
from cottention.engine.scheduling.preemption import Preemption
from cottention.engine.scheduling.prefix_reuse import PrefixReuse
from cottention.engine.scheduling.request import Request
from cottention.engine.scheduling.request_manager import RequestManager
from cottention.engine.scheduling.scheduler import Scheduler
from cottention.engine.scheduling.validation import Prompt, RequestLimits, RequestValidator
from cottention.engine.sessions.fingerprint import Fingerprint
from cottention.engine.sessions.snapshot import SnapshotCodec
from cottention.engine.state.prefix_cache import PrefixCache
from cottention.engine.state.session_state import SessionState


class Engine:
    """A model, its pool of states, and everybody who generates with them."""

    def __init__(self, model: str | Path | None = None, config: EngineConfig | None = None) -> None:
        """`model` is a folder, a Hugging Face id, or None for the model that ships here.

        Raises ModelFolderError, ConfigurationError or OutOfMemoryError.
        """
        self.config = config or EngineConfig()
        loaded = load(model, self.config)
        self.name, self.device, self.dtype = loaded.name, loaded.device, loaded.dtype
        self.model_config, self.tokenizer = loaded.model_config, loaded.tokenizer
        self.num_parameters, self._folder = loaded.num_parameters, loaded.folder
        self.pool, self.spec = loaded.pool, loaded.pool.spec
        beside = self.config.prompt_tokens_beside(self.device)
        self._scheduler = Scheduler(self.config.max_batch_tokens, beside)
        self._cache = PrefixCache(self.config.prefix_cache_bytes)
        self.policies = ContextPolicies.of(self.model_config, loaded.context_policy)
        window = self.policies.window
        max_paused = self.config.num_paused(self.pool.num_slots)
        self._pausing = Preemption(self._scheduler, self.pool, max_paused)
        warm = PrefixReuse(self.pool, self._cache)
        self._registry = RequestManager(self._scheduler, self.pool, self._pausing, warm, window)
        self._runner = loaded.runner
        self._stepper = Stepper(self._scheduler, self._registry, self._runner)
        limits = RequestLimits.of(self.tokenizer, self.pool, self.config)
        ends = self.model_config.reachable_ends
        self._intake = RequestValidator(self.tokenizer, ends, limits, self.policies)
        self._commands: queue.SimpleQueue[Callable[[], list[Output]]] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._is_closed = False
        self._followers = Followers(self)
        self._runner.warm_up()

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        start: SessionState | None = None,
        cache_scope: str | None = None,
    ) -> str:
        """Hand in a request and get its id; its outputs come from later steps.

        Lower `priority` starts first. With `start` the prompt follows what that session holds, and
        the last output tells the session after it. Within a `cache_scope` states after prompts are
        kept and reused. Raises ParameterError for a prompt or limits that cannot be and for a
        `request_id` in use, ContextPolicyError for a session past choosing, EngineStoppedError
        after close.
        """
        request_id = request_id or uuid.uuid4().hex
        request = self._intake.request(request_id, prompt_ids, params, start)
        request.priority = priority
        if cache_scope is not None and self.config.prefix_cache_bytes:
            request.reuse(cache_scope)
        with self._gate:
            if self._is_closed:
                raise EngineStoppedError("the engine has stopped and takes no more requests")
            self._registry.take_id(request_id)
            self._commands.put(lambda: self._registry.add(request))
        return request_id

    def cancel(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End a request in the next step; one that is unknown or has ended is left alone."""
        self._commands.put(lambda: self._registry.cancel(request_id, reason))

    def pause(self, request_id: str) -> None:
        """Generate no more until `resume`, others may have the slots; a prompt is still read.

        Past --max-paused-states those that have paused longest end, with FinishReason.UNREAD.
        """
        self._commands.put(lambda: self._registry.pause(request_id))

    def resume(self, request_id: str) -> None:
        """Go on with a request that pauses, as soon as there are slots."""
        self._commands.put(lambda: self._registry.resume(request_id))

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return not self._commands.empty() or self._scheduler.has_work()

    def step(self) -> list[Output]:
        """Do what was asked, then one step: at most one output for each choice."""
        return self._followers.post(self._run_commands() + self._stepper.step())

    def close(self) -> list[Output]:
        """Take no more work and cancel what is left; gives the last outputs."""
        with self._gate:
            self._is_closed = True
        return self._followers.post(self._run_commands() + self._registry.cancel_all())

    def session_codec(self) -> SnapshotCodec:
        """Sessions of this model to bytes and back; reads the model's files to know them."""
        fingerprints = Fingerprint.of(self._folder, self.spec, self.dtype)
        num_ids, window = self.tokenizer.num_ids, self.policies.window
        return SnapshotCodec(
            fingerprints, self.spec, num_ids, self.policies.context_schedules, window
        )

    def stats(self) -> EngineStats:
        """Figures of this moment."""
        finished = self._registry.num_finished
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_paused=self._pausing.num_paused,
            num_paused_states=self._pausing.num_states,
            max_paused_states=self._pausing.max_states,
            num_finished={reason: finished[reason] for reason in FinishReason},
            num_prompt_tokens=self._registry.num_prompt_tokens,
            num_generated_tokens=self._registry.num_generated_tokens,
            num_steps=self._stepper.num_steps,
            num_faults=self._stepper.num_faults,
            num_undrawn=self._stepper.num_undrawn,
            num_slots=self.pool.num_slots,
            num_free_slots=self.pool.num_free,
            pool_bytes=self.pool.nbytes,
            bytes_per_slot=self.spec.bytes_per_slot,
            prefix_cache=self._cache.stats(),
        )

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Output]:
        """Generate in this thread and yield outputs as they come; leaving early cancels."""
        named = {uuid.uuid4().hex: self._intake.ids(prompt)}
        yield from self._followers.follow(named, params or SamplingParams())

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Generate for all prompts together, in this thread: n completions for each, in order.

        Raises RequestFailedError where the engine failed on one of them.
        """
        params = params or SamplingParams()
        named = {uuid.uuid4().hex: self._intake.ids(prompt) for prompt in prompts}
        parts: dict[tuple[str, int], list[Output]] = {
            (request_id, index): [] for request_id in named for index in range(params.n)
        }
        for output in self._followers.follow(named, params):
            parts[output.request_id, output.choice].append(output)
        return [Completion.of(outputs) for outputs in parts.values()]

    def settle(self) -> None:
        """Run what was asked for since the last step, without a step."""
        self._followers.post(self._run_commands())

    def _run_commands(self) -> list[Output]:
        outputs: list[Output] = []
        while not self._commands.empty():
            outputs += self._commands.get()()
        return outputs


_log = logging.getLogger(__name__)

UNDRAWN = "no token could be drawn: every one is forbidden, or the model's logits are not finite"


class Stepper:
    """num_steps: that succeeded. num_undrawn: choices without a token that could be drawn."""

    def __init__(self, scheduler: Scheduler, registry: RequestManager, runner: ModelRunner) -> None:
        self._scheduler = scheduler
        self._registry = registry
        self._runner = runner
        self.num_steps = self.num_faults = self.num_undrawn = 0

    def step(self) -> list[Output]:
        """Schedule, run, postprocess: at most one output for each choice."""
        self._registry.admit()
        plan = self._scheduler.schedule()
        return self._advance(plan) if plan else []

    def _advance(self, plan: Batch) -> list[Output]:
        """Run a plan; a fault ends the plan's requests."""
        try:
            result = self._runner.run(plan)
        except Exception as error:
            _log.exception("a step failed; its %d requests end with an error", len(plan.requests))
            return [out for request in plan.requests for out in self._fault(request, error)]
        self.num_steps += 1
        outputs = self._registry.move_on(plan, result.scores)
        for sample in result.samples:
            outputs += self._accept(sample)
        self.num_undrawn += len(result.undrawn)
        failed = dict.fromkeys(choice.request for choice in result.undrawn)
        return outputs + [out for request in failed for out in self._fail(request, UNDRAWN)]

    def _accept(self, sample: Sample) -> list[Output]:
        """What an id means for its choice; a fault ends its request."""
        if sample.choice.finish_reason:  # by a fault of another choice of its request
            return []
        try:
            return [self._registry.accept(sample)]
        except Exception as error:
            _log.exception("an id could not be told; its request ends with an error")
            return self._fault(sample.choice.request, error)

    def _fault(self, request: Request, error: Exception) -> list[Output]:
        self.num_faults += 1
        return self._fail(request, f"the engine failed on this request ({type(error).__name__})")

    def _fail(self, request: Request, what: str) -> list[Output]:
        return self._registry.end(request, FinishReason.ERROR, what)


class Stepping(Protocol):
    """What a follower asks of an engine."""

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str
    ) -> str: ...
    def cancel(self, request_id: str) -> None: ...
    def step(self) -> list[Output]: ...
    def settle(self) -> None: ...


class Followers:
    """Several may follow in turn: what a step brings for another waits in its inbox."""

    def __init__(self, engine: Stepping) -> None:
        self._engine = engine
        self._inboxes: dict[str, deque[Output]] = {}

    def follow(
        self, prompts: Mapping[str, Sequence[int]], params: SamplingParams
    ) -> Iterator[Output]:
        """Outputs of prompts under these ids, stepping in this thread; leaving early cancels."""
        inbox: deque[Output] = deque()
        self._inboxes |= dict.fromkeys(prompts, inbox)
        try:
            for request_id, prompt_ids in prompts.items():
                self._engine.submit(prompt_ids, params, request_id=request_id)
            num_unfinished = len(prompts) * params.n
            while num_unfinished:
                self._engine.step()
                while inbox:  # also what others' steps bring while this one's reader is away
                    output = inbox.popleft()
                    num_unfinished -= output.finish_reason is not None
                    yield output
        finally:
            for request_id in prompts:
                del self._inboxes[request_id]
                self._engine.cancel(request_id)
            self._engine.settle()

    def post(self, outputs: list[Output]) -> list[Output]:
        """Put each output into the inbox of whoever follows its request."""
        for output in outputs:
            if output.request_id in self._inboxes:
                self._inboxes[output.request_id].append(output)
        return outputs

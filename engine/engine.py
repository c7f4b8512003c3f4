"""The engine: its verbs and its step.

Owns the way in: commands from any thread. A step is `stepper.py`'s. Knows no asyncio and no HTTP:
`submit`, `cancel` and `stats` may be called from any thread, `step` and `close` from one.
"""

import queue
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cottention.engine.config import EngineConfig
from cottention.engine.errors import EngineStoppedError
from cottention.engine.fingerprints import Fingerprints
from cottention.engine.following import Followers
from cottention.engine.intake import Intake, Prompt
from cottention.engine.limits import Limits
from cottention.engine.loading import load
from cottention.engine.outputs import Completion, EngineStats, FinishReason, Output
from cottention.engine.params import SamplingParams
from cottention.engine.pausing import Pausing
from cottention.engine.policies import Policies
from cottention.engine.prefix_cache import PrefixCache
from cottention.engine.registry import Registry
from cottention.engine.scheduler import Scheduler
from cottention.engine.session_state import SessionState
from cottention.engine.snapshot import SnapshotCodec
from cottention.engine.stepper import Stepper
from cottention.engine.warm_starts import WarmStarts


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
        self.policies = Policies.of(self.model_config, self.config.context_policy)
        window = self.policies.window
        max_paused = self.config.num_paused(self.pool.num_slots)
        self._pausing = Pausing(self._scheduler, self.pool, max_paused)
        warm = WarmStarts(self.pool, self._cache)
        self._registry = Registry(self._scheduler, self.pool, self._pausing, warm, window)
        self._runner = loaded.runner
        self._stepper = Stepper(self._scheduler, self._registry, self._runner)
        limits = Limits.of(self.tokenizer, self.pool, self.config)
        ends = self.model_config.reachable_ends
        self._intake = Intake(self.tokenizer, ends, limits, self.policies)
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
        fingerprints = Fingerprints.of(self._folder, self.spec, self.dtype)
        num_ids, window = self.tokenizer.num_ids, self.policies.window
        return SnapshotCodec(fingerprints, self.spec, num_ids, self.policies.grids, window)

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

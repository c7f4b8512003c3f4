"""The engine: its verbs and its step.

Owns the way in (commands from any thread) and the order of a step. Knows no asyncio and no HTTP:
`submit`, `cancel` and `stats` may be called from any thread, `step` and `close` from one.
"""

import logging
import queue
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import EngineStoppedError, ParameterError, RequestFailedError
from engine.loading import load
from engine.outputs import Completion, EngineStats, FinishReason, Output
from engine.params import SamplingParams
from engine.registry import Registry
from engine.request import Request
from engine.scheduler import Plan, Scheduler

_log = logging.getLogger(__name__)

Prompt = str | Sequence[int]


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
        self.num_parameters = loaded.num_parameters
        self.pool, self.spec = loaded.pool, loaded.pool.spec
        self._runner = loaded.runner
        self._scheduler = Scheduler(self.config.max_batch_tokens)
        self._registry = Registry(self._scheduler, self.pool, self.model_config.eos_token_ids)
        self._commands: queue.SimpleQueue[Callable[[], list[Output]]] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._is_closed = False
        self._num_steps = 0
        self._runner.warm_up()

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str | None = None
    ) -> str:
        """Hand in a request and get its id; its outputs come from later steps.

        A `request_id` of the caller's must not be that of a request that is still alive.

        Raises ParameterError for a prompt or limits that cannot be, EngineStoppedError after close.
        """
        self._check(prompt_ids, params)
        request_id = request_id or uuid.uuid4().hex
        request = Request.new(request_id, prompt_ids, params, self.tokenizer.token_bytes)
        with self._gate:
            if self._is_closed:
                raise EngineStoppedError("the engine has stopped and takes no more requests")
            self._commands.put(lambda: self._registry.add(request))
        return request_id

    def cancel(self, request_id: str) -> None:
        """End a request in the next step; one that is unknown or has ended is left alone."""
        self._commands.put(lambda: self._registry.cancel(request_id))

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return not self._commands.empty() or self._scheduler.has_work()

    def step(self) -> list[Output]:
        """Schedule, run, postprocess: at most one output for each choice."""
        outputs = self._run_commands()
        self._registry.admit()
        plan = self._scheduler.schedule()
        return outputs + self._advance(plan) if plan else outputs

    def close(self) -> list[Output]:
        """Take no more work and cancel what is left; gives the last outputs."""
        with self._gate:
            self._is_closed = True
        return self._run_commands() + self._registry.cancel_all()

    def stats(self) -> EngineStats:
        """Figures of this moment."""
        finished = self._registry.num_finished
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_finished={reason: finished[reason] for reason in FinishReason},
            num_prompt_tokens=self._registry.num_prompt_tokens,
            num_generated_tokens=self._registry.num_generated_tokens,
            num_steps=self._num_steps,
            num_slots=self.pool.num_slots,
            num_free_slots=self.pool.num_free,
            pool_bytes=self.pool.nbytes,
            bytes_per_slot=self.spec.bytes_per_slot,
        )

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Output]:
        """Generate in this thread and yield outputs as they come; leaving early cancels."""
        request_id = self.submit(self._ids(prompt), params or SamplingParams())
        try:
            while self.has_work():
                yield from (out for out in self.step() if out.request_id == request_id)
        finally:
            self.cancel(request_id)
            self._run_commands()

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Generate for all prompts together, in this thread: n completions for each, in order.

        Raises RequestFailedError where the engine failed on one of them.
        """
        params = params or SamplingParams()
        order = [self.submit(self._ids(prompt), params) for prompt in prompts]
        parts: dict[tuple[str, int], list[Output]] = {
            (request_id, index): [] for request_id in order for index in range(params.n)
        }
        while self.has_work():
            for output in self.step():
                parts[output.request_id, output.choice].append(output)
        return [_completion(outputs) for outputs in parts.values()]

    def _ids(self, prompt: Prompt) -> Sequence[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

    def _check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        if not prompt_ids:
            raise ParameterError("prompt", "prompt must hold at least one token; it is empty")
        top = self.tokenizer.num_ids - 1
        if not 0 <= min(prompt_ids) <= max(prompt_ids) <= top:
            raise ParameterError("prompt", f"prompt ids must be from 0 to {top}")
        if params.n > self.pool.num_slots:
            raise ParameterError("n", f"n must be at most {self.pool.num_slots}; it is {params.n}")
        limit = self.config.max_tokens_limit
        if params.max_tokens > limit:
            raise ParameterError(
                "max_tokens", f"max_tokens must be at most {limit}; it is {params.max_tokens}"
            )

    def _run_commands(self) -> list[Output]:
        outputs: list[Output] = []
        while not self._commands.empty():
            outputs += self._commands.get()()
        return outputs

    def _advance(self, plan: Plan) -> list[Output]:
        """Run a plan; a fault ends the plan's requests and nobody else's."""
        try:
            samples = self._runner.run(plan)
        except Exception as error:
            _log.exception("a step failed; its %d requests end with an error", len(plan.requests))
            return [out for request in plan.requests for out in self._fail(request, error)]
        self._num_steps += 1
        self._registry.move_on(plan)
        return [self._registry.accept(sample) for sample in samples]

    def _fail(self, request: Request, error: Exception) -> list[Output]:
        what = f"the engine failed on this request ({type(error).__name__})"
        return self._registry.end(request, FinishReason.ERROR, what)


def _completion(outputs: list[Output]) -> Completion:
    last = outputs[-1]
    if last.finish_reason is FinishReason.ERROR or last.finish_reason is None:
        raise RequestFailedError(last.error or "the request did not finish")
    ids = tuple(token_id for output in outputs for token_id in output.token_ids)
    return Completion("".join(output.text for output in outputs), ids, last.finish_reason)

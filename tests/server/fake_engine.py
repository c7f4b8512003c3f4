"""An engine without a model: every choice says the alphabet, one letter per step.

It does what `EngineWorker` and the server use of an `Engine`, as tests/contract shows. Text is a
function of the prompt, so that a test can ask for a fault or for a certain text:

    "fail"        ends with an error after one letter
    "die"         kills the engine's thread
    "quiet"       says nothing until its last token
    "loud"        says each letter ten thousand times
    "say:<text>"  says exactly <text>, a character a step, then stops

It waits while `may_step` is cleared: by a test, or by itself after `hold_after` generated tokens.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from cottention.engine.errors import EngineStoppedError, ParameterError
from cottention.engine.outputs import EngineStats, FinishReason, Output, TokenLogprob
from cottention.engine.sampling_params import SamplingParams, out_of_vocabulary
from cottention.engine.scheduling.client import DEFAULT_CLIENT, Client
from cottention.engine.scheduling.context_policy import ContextPolicies
from cottention.engine.scheduling.prefill_stops import CacheUse
from cottention.engine.state.context_window import context_schedules
from cottention.engine.state.session_state import SessionState
from cottention.engine.structured_output import StructuredOutput

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


class FakeTokenizer:
    """Bytes of UTF-8. before: ids that it puts before a text that is framed."""

    num_ids = 256
    token_bytes: ClassVar = [bytes([each]) for each in range(256)]
    written_bytes = token_bytes
    added_tokens: ClassVar[dict[int, Any]] = {}
    before: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def framed(self, ids: list[int]) -> list[int]:
        return [*self.before, *ids]

    def id_to_token(self, token_id: int) -> str:
        return f"<{token_id:02X}>"

    def written(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        return bytes([token_id]).decode(errors="replace")


class FakeModelConfig:
    trained_length = window = 512
    max_exact_length = None


class FakeSpec:
    bytes_per_row, bytes_per_slot = 500, 1000
    softmax_bytes_per_token = 80

    def itemised_bytes(self) -> dict[str, int]:
        return {"state": 400, "denominator": 100, "spare": 500}


class FakeEngineConfig:
    max_tokens_limit = 1_000_000


def fake_logprob(token_id: int, num_top: int) -> TokenLogprob:
    """The likeliest are ids 0, 1, ...; an id's logprob is a hundredth of it below 0."""
    top = tuple((n, -n / 100) for n in range(num_top))
    return TokenLogprob(token_id, -token_id / 100, token_id + 1, top)


class Cancelled(NamedTuple):
    """A request that was cancelled, and the steps that had begun by then and when it ended."""

    request_id: str
    asked_at: int
    ended_at: int


@dataclass
class Running:
    prompt: str
    params: SamplingParams
    prompt_ids: Sequence[int]
    priority: int = 0
    client: Client = DEFAULT_CLIENT
    cache: CacheUse | None = None
    said: int = 0
    cancelled_at: int | None = None
    is_paused: bool = False
    started: float = field(default_factory=time.monotonic)
    reason: FinishReason = FinishReason.ABORT
    start: SessionState | None = None
    drawn: list[int] = field(default_factory=list)
    unfinished: set[int] = field(default_factory=set)


class FakeEngine:
    name = "fake"
    capabilities = ("completions", "chat", "sessions")
    has_one_arithmetic = True

    def __init__(self, num_slots: int = 64, step_seconds: float = 0.0) -> None:
        self.tokenizer = FakeTokenizer()
        self.model_config = FakeModelConfig()
        self.config = FakeEngineConfig()
        self.default_sampling_params: dict[str, float] = {}
        self.policies = ContextPolicies("renew", 512, None, context_schedules(512))
        self.spec = FakeSpec()
        self.seen: list[Running] = []
        self.grammars: set[StructuredOutput] = set()
        self.num_slots = num_slots
        self.step_seconds = step_seconds
        self.may_step = threading.Event()
        self.may_step.set()
        self.hold_after: int | None = None
        self.running: dict[str, Running] = {}
        self.cancelled: list[Cancelled] = []
        self.num_steps = self.num_prompt = self.num_generated = 0
        self.finished = dict.fromkeys(FinishReason, 0)
        self._lock = threading.Lock()
        self._closed = False

    def has_grammar(self, structure: StructuredOutput) -> bool:
        return structure in self.grammars

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        start: SessionState | None = None,
        cache: CacheUse | None = None,
        client: Client = DEFAULT_CLIENT,
    ) -> str:
        start = None if start is None else self.policies.settled(start, params)
        self.policies.schedule(prompt_ids, params, start)
        if not prompt_ids and (start is None or not start.num_tokens):
            raise ParameterError("prompt", "prompt must hold at least one token; it is empty")
        if not all(0 <= each < 256 for each in prompt_ids):
            raise ParameterError("prompt", out_of_vocabulary("prompt ids", prompt_ids, 256))
        if params.n > self.num_slots:
            raise ParameterError("n", f"n must be at most {self.num_slots}; it is {params.n}")
        if params.max_tokens > self.config.max_tokens_limit:
            raise ParameterError("max_tokens", "max_tokens must be at most 1000000")
        if start is not None:
            self._check_turn(params)
        prompt = bytes(prompt_ids).decode(errors="replace")
        with self._lock:
            if self._closed:
                raise EngineStoppedError("the engine has stopped")
            if request_id in self.running:
                raise ParameterError("request_id", "there is an unfinished request of that id")
            self.num_prompt += len(prompt_ids)
            self.running[request_id] = Running(
                prompt, params, prompt_ids, priority, unfinished=set(range(params.n)), start=start
            )
            self.running[request_id].client, self.running[request_id].cache = client, cache
            self.seen.append(self.running[request_id])
        return request_id

    def _check_turn(self, params: SamplingParams) -> None:
        if params.n > 1:
            raise ParameterError("n", f"n must be 1 with a session; it is {params.n}")
        if params.prompt_logprobs is not None:
            raise ParameterError("prompt_logprobs", "prompt_logprobs is not told with a session")

    def cancel(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        with self._lock:
            if request := self.running.get(request_id):
                request.cancelled_at, request.reason = self.num_steps, reason

    def pause(self, request_id: str) -> None:
        if request := self.running.get(request_id):
            request.is_paused = True

    def resume(self, request_id: str) -> None:
        if request := self.running.get(request_id):
            request.is_paused = False

    def has_work(self) -> bool:
        running = list(self.running.values())
        return any(not each.is_paused or each.cancelled_at is not None for each in running)

    def warm_up(self) -> None:
        """Nothing is computed."""

    def step(self) -> list[Output]:
        self.may_step.wait()
        time.sleep(self.step_seconds)
        with self._lock:
            self.num_steps += 1
            outputs = [out for name in list(self.running) for out in self._step_one(name)]
            if self.hold_after is not None and self.num_generated >= self.hold_after:
                self.hold_after = None
                self.may_step.clear()
            return outputs

    def close(self) -> list[Output]:
        with self._lock:
            self._closed = True
            return [out for name in list(self.running) for out in self._cancel_one(name)]

    def stats(self) -> EngineStats:
        running = list(self.running.values())
        num_paused = sum(each.is_paused for each in running)
        return EngineStats(
            num_running=len(running) - num_paused,
            num_waiting=0,
            num_paused=num_paused,
            num_paused_states=0,
            max_paused_states=self.num_slots,
            num_finished=dict(self.finished),
            num_prompt_tokens=self.num_prompt,
            num_generated_tokens=self.num_generated,
            num_steps=self.num_steps,
            num_faults=0,
            num_undrawn=0,
            num_slots=self.num_slots,
            num_free_slots=self.num_slots - sum(len(r.unfinished) for r in running),
            pool_bytes=1000 * self.num_slots,
            bytes_per_slot=1000,
        )

    def _step_one(self, name: str) -> list[Output]:
        request = self.running[name]
        if request.cancelled_at is not None:
            self.cancelled.append(Cancelled(name, request.cancelled_at, self.num_steps))
            return self._cancel_one(name)
        if request.is_paused:
            return []
        if request.prompt == "die":
            raise RuntimeError("told to die")
        if request.prompt == "fail" and request.said == 1:
            return self._end(name, FinishReason.ERROR, "RuntimeError: secret internals")
        return self._speak(name, request)

    def _speak(self, name: str, request: Running) -> list[Output]:
        if request.params.max_tokens == 0:
            return self._end(name, FinishReason.LENGTH)
        said, request.said = request.said, request.said + 1
        text, reason = ALPHABET[said % 26], None
        if request.prompt.startswith("say:"):
            wanted = request.prompt.removeprefix("say:")
            text, reason = wanted[said], FinishReason.STOP if said + 1 == len(wanted) else None
        if request.said == request.params.max_tokens:
            reason = reason or FinishReason.LENGTH
        token_id = ord(text) % 256
        request.drawn.append(token_id)
        if request.prompt == "loud":
            text *= 10_000
        if request.prompt == "quiet" and reason is None:
            text = ""
        self.num_generated += len(request.unfinished)
        return self._end(name, reason, None, text, (token_id,))

    def _cancel_one(self, name: str) -> list[Output]:
        return self._end(name, self.running[name].reason)

    def _end(
        self,
        name: str,
        reason: FinishReason | None,
        error: str | None = None,
        text: str = "",
        ids: tuple[int, ...] = (),
    ) -> list[Output]:
        """One output per unfinished choice; with a reason, the last."""
        request = self.running[name]
        params, is_first = request.params, request.said <= 1
        num = params.logprobs
        outputs = [
            Output(
                name,
                choice,
                text,
                ids,
                reason,
                error,
                stop_reason=params.stop[0] if params.stop and reason is FinishReason.STOP else None,
                logprobs=() if num is None else tuple(fake_logprob(each, num) for each in ids),
                prompt_logprobs=self._scored(request) if is_first and choice == 0 else None,
                state=self._state(request, reason),
                started=request.started,
            )
            for choice in sorted(request.unfinished)
        ]
        if reason:
            self.finished[reason] += len(outputs)
            del self.running[name]
        return outputs

    def _state(self, request: Running, reason: FinishReason | None) -> SessionState | None:
        if request.start is None or reason not in (FinishReason.STOP, FinishReason.LENGTH):
            return None
        window = self.model_config.trained_length
        return request.start.extended(request.prompt_ids, request.drawn, window)

    def _scored(self, request: Running) -> tuple[TokenLogprob | None, ...] | None:
        num = request.params.prompt_logprobs
        if num is None:
            return None
        return (None, *(fake_logprob(each, num) for each in request.prompt_ids[1:]))

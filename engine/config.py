"""The engine's limits: the one declaration from which flags, variables, defaults and help are made.

Loads no torch: `--help` stays quick.
"""

from dataclasses import dataclass
from typing import Literal

from cottention.engine.errors import ConfigurationError
from cottention.engine.settings import check_options, option
from cottention.engine.state.context_window import ContextPolicy
from cottention.engine.state.spec import StateSpec

DEFAULT_SLOTS = 64

DType = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The engine's settings: each is a flag `--like-this` and a variable `COTTENTION_LIKE_THIS`."""

    device: Device = option("auto", "where the model runs; auto takes CUDA if there is one")
    dtype: DType = option(
        "auto", "type of the weights; auto is float32 on a CPU, the checkpoint's own on CUDA"
    )
    max_slots: int | None = option(
        None, "states in the pool, which is how many sequences run at once (default 64)", minimum=1
    )
    state_memory: int | None = option(
        None,
        "memory for the pool, instead of --max-slots; 512M and 2G are understood",
        minimum=1,
        unit="bytes",
    )
    max_paused_states: int | None = option(
        None,
        "states that wait on the host for slow readers of streams (default: as many as slots); past"
        " it the stream that has waited longest ends",
        minimum=0,
    )
    context_policy: Literal["auto", ContextPolicy] = option(
        "auto",
        "what becomes of a past longer than the trained length: renew keeps the model good and"
        " forgets the oldest, for a second row of memory for each state; exact is the papers'"
        " recurrence; auto is the model family's default, which is renew for gptj",
    )
    max_batch_tokens: int = option(
        512, "most tokens that one step computes, over all sequences", minimum=2, unit="tokens"
    )
    max_prefill_tokens: int | None = option(
        None,
        "most prompt tokens of a step in which others generate (default: on a CPU as many as"
        " generate, from 16; on CUDA any)",
        minimum=1,
        unit="tokens",
    )
    max_tokens_limit: int = option(
        1_000_000, "most tokens that one request may ask for", minimum=1, unit="tokens"
    )
    prefix_cache_bytes: int = option(
        256 * 1024**2, "memory for states after prompts; 0 keeps none", minimum=0, unit="bytes"
    )
    threads: int | None = option(None, "CPU threads (default: torch's own choice)", minimum=1)

    def __post_init__(self) -> None:
        check_options(self)
        if self.max_slots is not None and self.state_memory is not None:
            raise ConfigurationError("give --max-slots or --state-memory, not both")

    def prompt_tokens_beside(self, device: str) -> int | None:
        """Most prompt tokens of a step with running choices; None: as many as run."""
        if self.max_prefill_tokens is None and device.startswith("cuda"):
            return self.max_batch_tokens
        return self.max_prefill_tokens

    def num_paused(self, num_slots: int) -> int:
        """Most states that wait on the host for their readers."""
        return num_slots if self.max_paused_states is None else self.max_paused_states

    def num_slots(self, spec: StateSpec) -> int:
        """Slots in the pool. Raises ConfigurationError where the memory holds none."""
        if self.state_memory is None:
            return self.max_slots or DEFAULT_SLOTS
        slots = self.state_memory // spec.bytes_per_slot
        if slots < 1:
            raise ConfigurationError(
                f"--state-memory {self.state_memory} is less than the {spec.bytes_per_slot} bytes"
                " of one state of this model"
            )
        return slots

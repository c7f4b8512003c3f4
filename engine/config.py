"""The engine's settings. Loads no torch, so that `--help` stays quick."""

from dataclasses import dataclass
from typing import Literal

from cottention.engine.encoding import Pooling
from cottention.engine.errors import ConfigurationError
from cottention.engine.settings.declaration import MAX_THREADS, check_settings, setting
from cottention.engine.state.context_window import ContextPolicy
from cottention.engine.state.spec import StateSpec

DEFAULT_SLOTS = 64

DType = Literal["auto", "float32", "bfloat16", "int8"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of the engine."""

    device: Device = setting("auto", "device to run on; auto uses CUDA where it is available")
    dtype: DType = setting(
        "auto",
        "type of the weights; auto is float32 on the CPU and the checkpoint's type on CUDA; int8,"
        " on the CPU only, quantizes matrices when they are loaded",
    )
    compress_weights: bool = setting(
        False,
        "keep matrices of bfloat16 values in twelve bits a weight, with the same results, on the"
        " CPU: a quarter less memory; steps of up to ten streams with AVX-512, or one with AVX2,"
        " are faster, of more a little slower",
    )
    tokenizer: str | None = setting(
        None,
        "file of a World vocabulary of RWKV, or a folder of tokenizer files",
        unset="the model's own",
        is_path=True,
    )
    max_slots: int | None = setting(
        None,
        "maximum number of sequences in a batch, each with a slot for its state",
        unset=f"{DEFAULT_SLOTS}, or as --state-memory says",
        minimum=1,
    )
    state_memory: int | None = setting(
        None,
        "memory for the slots, instead of --max-slots; accepts 512M or 2G",
        unset="as --max-slots says",
        minimum=1,
        unit="bytes",
    )
    max_paused_states: int | None = setting(
        None,
        "maximum number of states kept on the host for streams whose clients read slowly; beyond"
        " it the stream that has been paused longest is ended",
        unset="the number of slots",
        minimum=0,
    )
    max_preempted_states: int | None = setting(
        None,
        "maximum number of states kept on the host for requests that have given up their slots to"
        " another API key's; beyond it a key waits until slots are free",
        unset="twice the number of slots",
        minimum=0,
    )
    context_policy: Literal["auto", ContextPolicy] = setting(
        "auto",
        "how to continue past the trained length; renew forgets the oldest tokens and keeps the"
        " text good, at twice the memory per slot; exact is the recurrence as published; auto is"
        " the default of the model's family, renew for gptj, else exact",
    )
    generation_config: Literal["auto", "vllm"] = setting(
        "auto",
        "sampling defaults of requests; auto is the model's generation_config.json, vllm ignores"
        " what it says about sampling",
    )
    max_batch_tokens: int = setting(
        512,
        "maximum number of tokens computed in a step, over all sequences",
        minimum=2,
        unit="tokens",
    )
    max_prefill_tokens: int | None = setting(
        None,
        "maximum number of prompt tokens in a step that also decodes",
        unset="on the CPU as many as are decoded, at least 16; on CUDA unlimited",
        minimum=1,
        unit="tokens",
    )
    max_tokens_limit: int = setting(
        1_000_000, "maximum max_tokens of a request", minimum=1, unit="tokens"
    )
    prefix_cache_bytes: int = setting(
        256 * 1024**2,
        "memory for the states of cached prompts; 0 disables the cache",
        minimum=0,
        unit="bytes",
    )
    grammar_seconds: float = setting(
        5.0,
        "maximum time to compile the schema, pattern or grammar of a request's structured output;"
        " one that takes longer is refused",
        minimum=0.01,
        unit="seconds",
    )
    grammar_memory: int = setting(
        256 * 1024**2,
        "maximum memory to compile one; one that needs more is refused",
        minimum=1024**2,
        unit="bytes",
    )
    max_grammar_size: int = setting(
        64 * 1024, "maximum length of one", minimum=1, unit="characters"
    )
    embeddings: bool = setting(
        False,
        "let a model that generates text give embeddings as well, of its last hidden states; an"
        " encoder always does",
    )
    pooling: Literal["auto", Pooling] = setting(
        "auto",
        "which hidden states are an embedding; auto is what 1_Pooling/config.json of the model's"
        " folder says, else mean",
    )
    normalize_embeddings: bool = setting(False, "divide embeddings by their Euclidean norm")
    encoder_memory: int = setting(
        1024**3,
        "memory for the hidden states of texts longer than --max-batch-tokens that an encoder reads"
        " at the same time; a text that needs more by itself is refused",
        minimum=1,
        unit="bytes",
    )
    threads: int | None = setting(
        None, "number of CPU threads", unset="chosen by torch", minimum=1, maximum=MAX_THREADS
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.max_slots is not None and self.state_memory is not None:
            raise ConfigurationError("give --max-slots or --state-memory, not both")

    def prompt_tokens_beside(self, device: str) -> int | None:
        """Maximum prompt tokens of a step that also decodes; None: as many as are decoded."""
        if self.max_prefill_tokens is None and device.startswith("cuda"):
            return self.max_batch_tokens
        return self.max_prefill_tokens

    def num_paused(self, num_slots: int) -> int:
        """Maximum number of paused states on the host."""
        return num_slots if self.max_paused_states is None else self.max_paused_states

    def num_preempted(self, num_slots: int) -> int:
        """Maximum number of preempted states on the host."""
        limit = self.max_preempted_states
        return 2 * num_slots if limit is None else limit

    def num_slots(self, spec: StateSpec) -> int:
        """Number of slots in the pool. Raises ConfigurationError where the memory holds none."""
        if self.state_memory is None:
            return self.max_slots or DEFAULT_SLOTS
        slots = self.state_memory // spec.bytes_per_slot
        if slots < 1:
            raise ConfigurationError(
                f"--state-memory {self.state_memory} is less than the {spec.bytes_per_slot} bytes"
                " of one state of this model"
            )
        return slots

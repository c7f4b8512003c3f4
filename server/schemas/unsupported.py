"""Unsupported fields of OpenAI's and vLLM's requests, and the values with which they are accepted.

Such a neutral value has no effect, so that clients which always send it work. `REASONS` says why
some fields will not be supported.
"""

from collections.abc import Mapping
from typing import Any

ANY = object()
"""Marks a field that has no effect here, whatever its value."""

NeutralValues = Mapping[str, tuple[Any, ...]]
"""By field: the values that have no effect and are accepted."""

SAMPLING: NeutralValues = {
    # OpenAI
    "user": (ANY,),
    # vLLM: sampling
    "use_beam_search": (False,),
    "length_penalty": (ANY,),  # only used by beam search
    "early_stopping": (False,),
    "spaces_between_special_tokens": (ANY,),  # byte-level BPE adds none
    "logits_processors": ([],),
    "watermarking": (False,),
    "repetition_detection": (),
    "max_repetition_pattern_size": (0,),
    "min_repetition_pattern_size": (0,),
    "repetition_min_count": (0,),
    "thinking_token_budget": (-1,),
    # vLLM: the rest
    "structural_tag": (),
    "guided_decoding_backend": (ANY,),  # there is one
    "guided_whitespace_pattern": (),  # structured_outputs has whitespace_pattern
    "return_token_offsets": (ANY,),  # only used by vLLM's render endpoints
    "return_mm_kwargs": (ANY,),  # only used for inputs other than text
    "routed_experts_prompt_start": (0,),
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "vllm_xargs": ({},),
    "stream_interval": (1,),
}

COMPLETION: NeutralValues = {**SAMPLING, "suffix": ("",), "prompt_embeds": ()}

CHAT: NeutralValues = {
    **SAMPLING,
    # OpenAI
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "metadata": (ANY,),  # nothing is stored
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_key": (ANY,),
    "prompt_cache_options": (),
    "prompt_cache_retention": (ANY,),
    "reasoning_effort": ("none",),
    "safety_identifier": (ANY,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM
    "best_of": (1,),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "return_prompt_text": (False,),
    "include_reasoning": (ANY,),  # there is none
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}

TOKENIZE: NeutralValues = {
    "chat_template": (),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "tools": ([],),
}

STREAM_OPTIONS: NeutralValues = {"include_obfuscation": (False,)}

REASONS: Mapping[str, str] = {
    "suffix": "the model only continues text",
    "functions": "tools have taken its place",
    "function_call": "tool_choice has taken its place",
    "chat_template": "the server's template is chosen with --chat-template",
    "use_beam_search": "a session has one state",
    "prompt_embeds": "prompts are text or token ids",
    "dimensions": "an embedding is as wide as the model",
}
"""Why a field is not supported, where "not yet" would be wrong."""


def is_neutral(neutral: tuple[Any, ...], value: Any) -> bool:
    """Whether `value` is one of those without effect; true is not 1 and false is not 0."""
    return any(each is ANY or _is_same(each, value) for each in neutral)


def _is_same(neutral: Any, value: Any) -> bool:
    """Whether two JSON values are equal, where null in an object of `value` counts as absent."""
    if isinstance(neutral, dict) and isinstance(value, dict):
        given = {name: each for name, each in value.items() if each is not None}
        return neutral.keys() == given.keys() and all(
            _is_same(neutral[name], given[name]) for name in neutral
        )
    return bool(neutral == value) and isinstance(neutral, bool) == isinstance(value, bool)

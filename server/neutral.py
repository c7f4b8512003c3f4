"""Fields of OpenAI's and vLLM's completion requests that are not built yet.

Owns which values of them change nothing and are therefore accepted. A field moves from here to
`schemas.py` when it is built.
"""

from collections.abc import Mapping
from typing import Any

ANY = object()
"""Marks a field that changes nothing here, whatever its value."""

NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    # OpenAI
    "echo": (False,),
    "logprobs": (),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "user": (ANY,),
    # vLLM: sampling
    "use_beam_search": (False,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (ANY,),  # byte-level BPE puts none there
    "truncate_prompt_tokens": (),
    "truncation_side": (ANY,),  # of what is not truncated
    "allowed_token_ids": (),
    "prompt_logprobs": (),
    "logprob_token_ids": (),
    "bad_words": ([],),
    "logits_processors": ([],),
    "watermarking": (False,),
    "repetition_detection": (),
    "thinking_token_budget": (-1,),
    # vLLM: the rest
    "prompt_embeds": (),
    "add_special_tokens": (ANY,),  # the models' tokenizers add none
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "structural_tag": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "priority": (0,),
    "request_id": (),
    "session_id": (),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_mm_kwargs": (ANY,),  # of inputs other than text
    "routed_experts_prompt_start": (0,),
    "cache_salt": (ANY,),  # nothing is shared between requests
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "vllm_xargs": ({},),
    "stream_interval": (1,),
}

NEUTRAL_STREAM_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "continuous_usage_stats": (False,),
    "include_obfuscation": (False,),
}


def is_neutral(allowed: tuple[Any, ...], value: Any) -> bool:
    """Whether `value` is one of those that change nothing; true is not 1 and false is not 0."""
    return any(
        each is ANY or (each == value and isinstance(each, bool) == isinstance(value, bool))
        for each in allowed
    )

"""A softmax GPT-J of `transformers` with a KV cache, for a decode step at a given context length.

Both cache types: the dynamic cache, its default, copies all keys and values at each token; the
static cache is allocated for the longest context and written in place.
"""

from collections.abc import Callable
from typing import Any

import torch

from cottention.engine.models.gptj.config import GPTJConfig

SPARE = 64
"""Number of tokens that can be decoded beyond the context."""


def build(config: GPTJConfig, longest: int) -> Any:
    """A random float32 GPT-J of this shape, for contexts of up to `longest` tokens."""
    from transformers import GPTJConfig, GPTJForCausalLM

    shape = GPTJConfig(
        vocab_size=config.vocab_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_inner=config.n_inner,
        rotary_dim=config.rotary_dim,
        n_positions=longest + SPARE,
    )
    return GPTJForCausalLM(shape).eval()


class Stream:
    """`batch` sequences with a cache of `context` constant entries; each call decodes one token."""

    def __init__(self, model: Any, kind: str, batch: int, context: int) -> None:
        self._model = model
        self._ids = torch.zeros(batch, 1, dtype=torch.int64)
        self._cache = CACHES[kind](model, batch, context)
        if self._cache.get_seq_length() != context:
            raise SystemExit(f"the {kind} cache does not hold {context} tokens")

    @torch.inference_mode()
    def __call__(self) -> None:
        """One token for each sequence."""
        out = self._model(self._ids, past_key_values=self._cache, use_cache=True)
        self._ids = out.logits[:, -1:].argmax(-1)


def _dynamic(model: Any, batch: int, context: int) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    shape = batch, model.config.n_head, context, model.config.n_embd // model.config.n_head
    for layer in range(model.config.n_layer):
        cache.update(torch.full(shape, 0.01), torch.full(shape, 0.01), layer)
    return cache


@torch.inference_mode()
def _static(model: Any, batch: int, context: int) -> Any:
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=context + SPARE)
    model(torch.zeros(batch, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys.fill_(0.01)
        layer.values.fill_(0.01)
        layer.cumulative_length.fill_(context)
    return cache


CACHES: dict[str, Callable[[Any, int, int], Any]] = {"dynamic": _dynamic, "static": _static}

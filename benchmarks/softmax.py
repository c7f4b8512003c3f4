"""A softmax GPT-J of `transformers` with its KV cache, for a step at a given context."""

from typing import Any

import torch

from engine.config import ModelConfig

SPARE_POSITIONS = 1024


def build(config: ModelConfig, longest: int) -> Any:
    """A random float32 GPT-J of this shape, good for `longest` tokens of context."""
    from transformers import GPTJConfig, GPTJForCausalLM

    shape = GPTJConfig(
        vocab_size=config.vocab_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_inner=config.n_inner,
        rotary_dim=config.rotary_dim,
        n_positions=longest + SPARE_POSITIONS,
    )
    return GPTJForCausalLM(shape).eval()


class Stream:
    """`batch` sequences whose cache holds `context` tokens of noise; each call decodes one more."""

    def __init__(self, model: Any, config: ModelConfig, batch: int, context: int) -> None:
        from transformers import DynamicCache

        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._ids = torch.zeros(batch, 1, dtype=torch.int64)
        shape = batch, config.n_head, context, config.head_dim
        for layer in range(config.n_layer):
            self._cache.update(torch.full(shape, 0.01), torch.full(shape, 0.01), layer)

    @torch.inference_mode()
    def __call__(self) -> None:
        """One token for each sequence."""
        out = self._model(self._ids, past_key_values=self._cache, use_cache=True)
        self._ids = out.logits[:, -1:].argmax(-1)

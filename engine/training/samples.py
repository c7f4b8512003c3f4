"""Greedy text from a model just trained, for a person to look at.

Owns the simplest of decoders: the last window of the text again for every token. Not for serving.
"""

import torch
from cottention.engine.model import CottentionForCausalLM
from cottention.engine.training.bpe import end_of_text_id
from cottention.engine.training.forward import logits_of
from tokenizers import Tokenizer

PROMPTS = (
    "def __init__(self, ",
    "import os\nimport sys\n\n",
    'class Queue:\n    """',
    "    for key, value in ",
)


@torch.no_grad()
def greedy_text(
    model: CottentionForCausalLM, tokenizer: Tokenizer, prompt: str, num_tokens: int = 64
) -> str:
    """`prompt` and what the model, on the CPU in float32, thinks most likely to follow it."""
    ids = [end_of_text_id(tokenizer), *tokenizer.encode(prompt).ids]
    for _ in range(num_tokens):
        logits = logits_of(model, torch.tensor([ids[-model.config.window :]]), dtype=torch.float32)
        ids.append(int(logits[0, -1].argmax()))
    text: str = tokenizer.decode(ids)
    return text

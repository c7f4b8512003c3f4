"""Twins of encoders, trained to predict masked tokens (BERT's 15 %)."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.papers.loop import Schedule, num_parameters, train
from benchmarks.papers.results import Result
from benchmarks.papers.text import small_text
from cottention.engine.models.bert.config import BertConfig
from cottention.engine.training.data import training_batch
from cottention.engine.training.encoder import mask_tokens, masked_loss, new_encoder


@dataclass(frozen=True, slots=True)
class Masked:
    """A run. The text's ids are followed by the mask token, and by unused ones up to eight."""

    attention: str
    seed: int
    learning_rate: float
    steps: int = 600
    layers: int = 3
    width: int = 128
    heads: int = 4
    vocab_size: int = 1024
    context: int = 128
    batch_tokens: int = 2048
    weight_decay: float = 0.3
    warmup_steps: int = 50

    def run(self, folder: Path, shared: Path) -> Result:
        """Train from random weights and predict the masked tokens of held-out code."""
        text = small_text(self.vocab_size, self.context, shared)
        task = _Task(self, text.stream)
        schedule = Schedule(
            self.steps, self.learning_rate, self.weight_decay, warmup_steps=self.warmup_steps
        )
        progress = train(task, schedule, folder)
        return {
            "bits_per_token": round(task.held_out_bits(text.held_out_stream), 5),
            "training_loss": round(progress.loss, 4),
            "parameters": num_parameters(task.model),
            "tokens": self.steps * self.batch_tokens,
            "passes": round(self.steps * self.batch_tokens / len(text.stream), 3),
            "cpu_seconds": round(progress.cpu_seconds, 1),
        }


class _Task:
    """Windows of the text, shuffled by the run's seed, with masks of the seed and the step."""

    def __init__(self, run: Masked, stream: Tensor) -> None:
        self._run, self._stream = run, stream
        torch.manual_seed(run.seed)
        self.model = new_encoder(
            BertConfig(
                vocab_size=run.vocab_size + 8,
                hidden_size=run.width,
                num_hidden_layers=run.layers,
                num_attention_heads=run.heads,
                intermediate_size=4 * run.width,
                max_position_embeddings=run.context,
                attention_type="cottention" if run.attention == "cottention" else "cosformer",
            )
        )

    def loss(self, step: int) -> Tensor:
        run = self._run
        batch = run.batch_tokens // run.context
        ids = training_batch(self._stream, run.context, batch, run.seed, step).inputs
        return self._loss(ids, run.seed * 1_000_003 + step, torch.bfloat16)

    def _loss(self, ids: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
        run = self._run
        generator = torch.Generator().manual_seed(seed)
        shown, is_chosen = mask_tokens(ids, run.vocab_size, run.vocab_size, generator)
        return masked_loss(self.model, run.attention, shown, ids, is_chosen, dtype=dtype)

    @torch.no_grad()
    def held_out_bits(self, stream: Tensor, batch: int = 16) -> float:
        """−log₂ p per masked token of stream int64 [N]; the same masks for every model."""
        windows = stream[: len(stream) // self._run.context * self._run.context]
        groups = windows.view(-1, self._run.context).split(batch)
        losses = [self._loss(ids, seed, torch.float32) for seed, ids in enumerate(groups)]
        sizes = torch.tensor([len(group) for group in groups])
        return float((torch.stack(losses) * sizes).sum() / sizes.sum()) / math.log(2)

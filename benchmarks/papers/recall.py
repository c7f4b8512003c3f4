"""Multi-query associative recall (arXiv 2312.04927), generated: pairs, then a query of each key.

A sequence is k₁ v₁ k₂ v₂ … and then all the keys in another order; at a query the model must name
the value that followed the key. Keys do not repeat, values do.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.papers.loop import Schedule, num_parameters, train
from benchmarks.papers.results import Result
from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.gptj.model import CottentionForCausalLM
from cottention.engine.training.forward import attend_from_zero, init_weights

NUM_PAIRS = (64, 128, 256, 512, 1024)
"""Pairs per sequence for which accuracy is told."""

NUM_VALUES = 64
TEST_QUERIES = 8192
TEST_SEED = 1_000_000_007


def recall_batch(
    num_keys: int, num_pairs: int, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ids int64 [batch, 3 · num_pairs] and the values of the queries int64 [batch, num_pairs].

    Keys have the ids below `num_keys`, values the 64 behind them; answers count from 0.
    """
    keys = torch.stack([torch.randperm(num_keys, generator=generator) for _ in range(batch)])
    keys = keys[:, :num_pairs]
    values = torch.randint(NUM_VALUES, keys.shape, generator=generator)
    order = torch.rand(keys.shape, generator=generator).argsort(-1)
    pairs = torch.stack([keys, num_keys + values], dim=-1).flatten(1)
    return torch.cat([pairs, keys.gather(1, order)], dim=-1), values.gather(1, order)


@dataclass(frozen=True, slots=True)
class Recall:
    """A run. Batches have from `first_pairs` pairs, at first, to any of up to `most_pairs`.

    The largest number of pairs doubles until half of the steps are done; each batch draws its
    number among the powers of two up to there.
    """

    attention: str
    width: int
    learning_rate: float
    seed: int = 1
    steps: int = 800
    layers: int = 2
    heads: int = 2
    num_keys: int = 1024
    first_pairs: int = 4
    most_pairs: int = 1024
    batch_tokens: int = 3072
    weight_decay: float = 0.1
    warmup_steps: int = 50
    products: str = "bfloat16"
    """Type of the products of matrices in training."""

    def run(self, folder: Path, _shared: Path) -> Result:
        """Train from random weights; accuracy on new sequences."""
        task = _Task(self)
        schedule = Schedule(
            self.steps, self.learning_rate, self.weight_decay, warmup_steps=self.warmup_steps
        )
        progress = train(task, schedule, folder)
        config = task.model.config
        is_recurrent = config.feature_map.is_recurrent
        return {
            "accuracy": {str(pairs): round(task.accuracy(pairs), 4) for pairs in NUM_PAIRS},
            "chance": round(1 / NUM_VALUES, 4),
            "training_loss": round(progress.loss, 4),
            "parameters": num_parameters(task.model),
            "state_bytes": config.state_spec().bytes_per_slot if is_recurrent else None,
            "tokens": self.steps * self.batch_tokens,
            "cpu_seconds": round(progress.cpu_seconds, 1),
        }

    def config(self) -> GPTJConfig:
        """The model's shape; rotary on half of each head, so that the rest ignores distance."""
        longest = 3 * self.most_pairs
        return GPTJConfig(
            vocab_size=self.num_keys + NUM_VALUES,
            n_embd=self.width,
            n_layer=self.layers,
            n_head=self.heads,
            n_positions=longest,
            rotary_dim=self.width // self.heads // 2,
            n_inner=2 * self.width,
            attention_type=self.attention,
            cosformer_max_length=longest if self.attention == "cosformer" else None,
        )


class _Task:
    """Batches of the run's seed and the step; the head knows values alone."""

    def __init__(self, run: Recall) -> None:
        self._run = run
        torch.manual_seed(run.seed)
        self.model = init_weights(CottentionForCausalLM(run.config()))
        self.model.lm_head = nn.Linear(run.width, NUM_VALUES)
        nn.init.zeros_(self.model.lm_head.bias)
        nn.init.normal_(self.model.lm_head.weight, std=0.02)

    def loss(self, step: int) -> Tensor:
        run = self._run
        generator = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
        stages = (run.most_pairs // run.first_pairs).bit_length()
        reached = min(stages, 1 + int(2 * step / run.steps * stages))
        num_pairs = run.first_pairs << int(torch.randint(reached, (), generator=generator))
        batch = max(1, run.batch_tokens // (3 * num_pairs))
        ids, answers = recall_batch(run.num_keys, num_pairs, batch, generator)
        logits = self._answers(ids, getattr(torch, run.products))
        return nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())

    def _answers(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Logits float32 [B, pairs, 64] at the queries."""
        positions = torch.arange(ids.shape[1])
        with torch.autocast("cpu", dtype=dtype, enabled=dtype.itemsize < 4):
            logits = self.model(ids, positions, attend_from_zero(self.model.config, dtype))
        return logits[:, ids.shape[1] // 3 * 2 :].float()

    @torch.no_grad()
    def accuracy(self, num_pairs: int) -> float:
        """Fraction of right answers to 8,192 queries, in float32."""
        generator = torch.Generator().manual_seed(TEST_SEED)
        right = 0
        for _ in range(TEST_QUERIES // num_pairs // 4):
            ids, answers = recall_batch(self._run.num_keys, num_pairs, 4, generator)
            right += int((self._answers(ids, torch.float32).argmax(-1) == answers).sum())
        return right / (TEST_QUERIES // num_pairs // 4 * 4 * num_pairs)

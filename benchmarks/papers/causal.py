"""Causal twins: one shape and one text for every kind of attention, and changes of one thing."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.papers.loop import Schedule, num_parameters, train
from benchmarks.papers.results import Result
from benchmarks.papers.text import small_text
from cottention.engine.models.gptj.model import CottentionForCausalLM
from cottention.engine.training.data import training_batch
from cottention.engine.training.evaluate import score
from cottention.engine.training.forward import init_weights, mean_loss
from cottention.engine.training.settings import TrainingSettings


@dataclass(frozen=True, slots=True)
class Causal:
    """A run. The values of what is not given are those of the table of twins.

    first_sigma, last_sigma: σ(m) of the first and last head at first; None: what training takes.
    query_key_scale, value_scale: multiply these projections at first. In Cottention the former
    cancels in N(x): it changes how far an update turns queries and keys, and nothing else.
    equal_query_key: each query projection is at first its layer's key projection.
    """

    attention: str
    seed: int
    learning_rate: float
    steps: int = 500
    layers: int = 3
    width: int = 128
    heads: int = 4
    vocab_size: int = 1024
    context: int = 256
    batch_tokens: int = 2048
    weight_decay: float = 0.3
    warmup_steps: int = 50
    rotary_dim: int | None = None
    first_sigma: float | None = None
    last_sigma: float | None = None
    map_rate: float = 1.0
    map_weight_decay: float = 0.0
    query_key_scale: float = 1.0
    value_scale: float = 1.0
    equal_query_key: bool = False

    def run(self, folder: Path, shared: Path) -> Result:
        """Train from random weights and score all held-out code."""
        text = small_text(self.vocab_size, self.context, shared)
        task = _Task(self, text.stream)
        schedule = Schedule(
            steps=self.steps,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            map_rate=self.map_rate,
            map_weight_decay=self.map_weight_decay,
        )
        progress = train(task, schedule, folder)
        result = score(task.model, text.held_out, dtype=torch.float32, batch=16)
        return {
            "bits_per_byte": round(result.bits_per_byte, 5),
            "by_position": {place: round(bits, 5) for place, bits in result.by_position.items()},
            "training_loss": round(progress.loss, 4),
            "parameters": num_parameters(task.model),
            "tokens": self.steps * self.batch_tokens,
            "passes": round(self.steps * self.batch_tokens / len(text.stream), 3),
            "cpu_seconds": round(progress.cpu_seconds, 1),
            **_sigmas(task.model),
        }

    def settings(self) -> TrainingSettings:
        """The shape as the package's own training takes it."""
        return TrainingSettings(
            attention=self.attention,
            context=self.context,
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            vocab_size=self.vocab_size,
            batch_tokens=self.batch_tokens,
            rotary_dim=self.rotary_dim,
        )


class _Task:
    """Windows of the text, shuffled by the run's seed; products in bfloat16."""

    def __init__(self, run: Causal, stream: Tensor) -> None:
        self._run, self._stream = run, stream
        self.model = new_twin(run, int(stream[0]))

    def loss(self, step: int) -> Tensor:
        run = self._run
        batch = run.batch_tokens // run.context
        windows = training_batch(self._stream, run.context, batch, run.seed, step)
        return mean_loss(self.model, windows, dtype=torch.bfloat16)


def new_twin(run: Causal, end_of_text: int) -> CottentionForCausalLM:
    """The run's model with its first weights."""
    torch.manual_seed(run.seed)
    config = run.settings().model_config(end_of_text)
    model = init_weights(CottentionForCausalLM(config))
    _change(model, run)
    return model


@torch.no_grad()
def _change(model: CottentionForCausalLM, run: Causal) -> None:
    for block in model.blocks():
        block.attn.q_proj.weight *= run.query_key_scale
        block.attn.k_proj.weight *= run.query_key_scale
        block.attn.v_proj.weight *= run.value_scale
        if run.equal_query_key:
            block.attn.q_proj.weight.copy_(block.attn.k_proj.weight)
        if run.first_sigma is not None and run.last_sigma is not None:
            sigma = torch.linspace(run.first_sigma, run.last_sigma, run.heads)
            block.attn.get_parameter("norm_const").copy_(torch.logit(sigma).view(1, -1, 1, 1))


def _sigmas(model: CottentionForCausalLM) -> Result:
    """σ(m) of all heads after training, by layer, for a model that has m."""
    if model.config.attention_type != "cottention":
        return {}
    layers = [block.attn.get_parameter("norm_const") for block in model.blocks()]
    return {"sigma": [[round(x, 3) for x in m.sigmoid().flatten().tolist()] for m in layers]}

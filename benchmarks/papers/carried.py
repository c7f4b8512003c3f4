"""Training with windows that carry their state, beside renewal of a state that was not carried.

As in arXiv 2507.02782, a window begins with the state, without gradient, that the window before it
left. Both models get as many tokens; held-out bits per byte are told by position up to 4,096.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.held_out import LongText
from benchmarks.long_context import Nats, bits_by_position, exact, renewed
from benchmarks.papers.causal import Causal, new_twin
from benchmarks.papers.loop import Schedule, num_parameters, train
from benchmarks.papers.results import Result
from benchmarks.papers.text import small_text
from cottention.engine.models.recurrence import Features
from cottention.engine.ops.varlen import chunked
from cottention.engine.training.data import training_batch
from cottention.engine.training.forward import mean_loss

TOLD_LENGTH = 4096
NUM_STREAMS = 32
"""Of the long streams that are scored; they begin at evenly spaced places of the text."""

KEPT_PART = 4
"""R = W / 4, as the engine renews."""


@dataclass(frozen=True, slots=True)
class Carried:
    """A run of Cottention. plain_steps of its steps are ordinary ones, from a zero state.

    In the others, rows of consecutive windows carry their state for `windows` windows and then
    begin anew; the rows of a batch are of different ages.
    """

    seed: int
    learning_rate: float
    plain_steps: int
    steps: int = 500
    windows: int = 16

    def run(self, folder: Path, shared: Path) -> Result:
        """Train, and score the held-out code by position: renewed, and by the exact recurrence."""
        shape = Causal("cottention", self.seed, self.learning_rate, steps=self.steps)
        text = small_text(shape.vocab_size, shape.context, shared)
        task = _Task(self, shape, text.stream)
        schedule = Schedule(
            self.steps, self.learning_rate, shape.weight_decay, warmup_steps=shape.warmup_steps
        )
        progress = train(task, schedule, folder)
        long = LongText(text.held_out_stream[:-1], text.held_out.token_bytes)
        ways: dict[str, Nats] = {
            "renewed": functools.partial(renewed, kept=shape.context // KEPT_PART),
            "exact": exact,
        }
        scored = bits_by_position(task.model, long, ways, NUM_STREAMS, TOLD_LENGTH)
        return {
            **{
                how: {place: round(each.level, 4) for place, each in bits.items()}
                for how, bits in scored
            },
            "training_loss": round(progress.loss, 4),
            "parameters": num_parameters(task.model),
            "tokens": self.steps * shape.batch_tokens,
            "cpu_seconds": round(progress.cpu_seconds, 1),
        }


class _Task:
    """Ordinary batches at first; then rows that go on where they were.

    A run that is continued from a checkpoint begins its rows anew: their ages follow from the step,
    but no state of theirs is older than the process.
    """

    def __init__(self, run: Carried, shape: Causal, stream: Tensor) -> None:
        self._run, self._shape, self._stream = run, shape, stream
        self.model = new_twin(shape, int(stream[0]))
        self._batch = shape.batch_tokens // shape.context
        self._begun = torch.full((self._batch,), -1)
        self._states: list[Tensor] = []

    def loss(self, step: int) -> Tensor:
        run, shape = self._run, self._shape
        if step < run.plain_steps:
            batch = training_batch(self._stream, shape.context, self._batch, shape.seed, step)
            return mean_loss(self.model, batch, dtype=torch.bfloat16)
        ages = (step - run.plain_steps + self._offsets()) % run.windows
        if not self._states:
            ages = torch.zeros_like(ages)
            self._begun = torch.full_like(ages, step)
            self._states = [self._zeros() for _ in self.model.blocks()]
        elif (ages == 0).any():
            self._begun = torch.where(ages == 0, step, self._begun)
            for state in self._states:
                state[ages == 0] = 0
        ages = step - self._begun
        starts = self._starts() + ages * shape.context
        places = starts.unsqueeze(-1) + torch.arange(shape.context)
        positions = (ages * shape.context).unsqueeze(-1) + torch.arange(shape.context)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.model(self._stream[places].flatten(), positions.flatten(), self._attend)
        return nn.functional.cross_entropy(logits.float(), self._stream[places + 1].flatten())

    def _offsets(self) -> Tensor:
        return torch.arange(self._batch) * self._run.windows // self._batch

    def _starts(self) -> Tensor:
        """Where in the text each row began, int64 [B]: random, by row and step of its beginning."""
        last = len(self._stream) - 1 - self._run.windows * self._shape.context
        seeds = [
            (self._run.seed * 1_000_003 + int(step)) * self._batch + row
            for row, step in enumerate(self._begun)
        ]
        draws = [torch.randint(last, (), generator=torch.Generator().manual_seed(x)) for x in seeds]
        return torch.stack(draws)

    def _zeros(self) -> Tensor:
        shape = self.model.config.state_spec().shapes["state"]
        return torch.zeros(self._batch, *shape[1:])

    def _attend(self, layer: int, features: Features) -> Tensor:
        """The batch's rows one after the other, [N, H, ·], as their positions differ."""
        rows = self._batch, self._shape.context
        q, k, v = (x.unflatten(0, rows).transpose(1, 2).to(torch.bfloat16) for x in features[:3])
        out, state, _ = chunked(q, k, v, self._states[layer])
        self._states[layer] = state.detach()
        return out.transpose(1, 2).flatten(0, 1)

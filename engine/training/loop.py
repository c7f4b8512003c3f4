"""The run itself: steps, scores, checkpoints, from the first or from where a killed run stood.

Owns the order of things and the clock. Does not know where text comes from or where a finished
model goes.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from cottention.engine.training import checkpoint
from cottention.engine.training.data import Windows, batches_per_epoch, epoch_batch
from cottention.engine.training.forward import add_dropout, first_model, mean_loss
from cottention.engine.training.optimize import Optimizers, rate_factor
from cottention.engine.training.progress import PlainProgress, Standing
from cottention.engine.training.score import HeldOut, score
from cottention.engine.training.settings import TrainingSettings
from torch import Tensor

LOSS_MEMORY = 0.98
RATE_MEMORY = 0.9

IDENTITY = (
    "seed",
    "attention",
    "rotary_dim",
    "context",
    "layers",
    "width",
    "heads",
    "vocab_size",
    "batch_tokens",
    "learning_rate",
    "weight_decay",
    "dropout",
    "cut_every",
)
"""Settings that a resumed run must share with the one it continues."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished run: the best weights and how they came to be."""

    weights: dict[str, Tensor]
    best_step: int
    steps: int
    tokens: int
    epochs: float
    seconds: float


@dataclass(slots=True)
class Place:
    """Where a run stands: what a checkpoint holds besides weights, optimizers and random state."""

    step: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    best_step: int = 0
    best_bits: float = float("inf")


class Run:
    """One training run over a token stream."""

    def __init__(
        self, settings: TrainingSettings, stream: Tensor, held_out: HeldOut, corpus_sha256: str
    ) -> None:
        self._settings, self._stream, self._held_out = settings, stream, held_out
        self._device = device_of(settings)
        self._dtype = torch.bfloat16
        self._identity = {name: getattr(settings, name) for name in IDENTITY}
        self._identity["corpus"] = corpus_sha256
        torch.manual_seed(settings.seed)
        self.model_config = settings.model_config(end_of_text=int(stream[0]))
        self._model = first_model(self.model_config, settings.begin_with)
        add_dropout(self._model, settings.dropout)
        self._model.to(self._device).train()
        self._optimizers = Optimizers(self._model, settings.learning_rate, settings.weight_decay)
        self._per_epoch = batches_per_epoch(stream, settings.context, settings.batch)
        self._steps = settings.steps or round(settings.epochs * self._per_epoch)
        self._place = Place()
        self._speed = 0.0

    def train(self, progress: PlainProgress) -> Outcome:
        """Run to the end, saving on the way; an interrupt leaves the last checkpoint."""
        if self._settings.resume:
            self._resume(progress)
        while self._done() < 1:
            self._step()
            progress.show(self._standing())
            last = self._done() >= 1
            if last or self._place.step % self._settings.eval_every == 0:
                self._score(progress)
            if last or self._place.step % self._settings.save_every == 0:
                self._save(checkpoint.LATEST)
        return self._outcome()

    def _done(self) -> float:
        """Share of the run that lies behind: of its steps or of its hours, whichever is more."""
        by_steps = self._place.step / self._steps
        if self._settings.hours is None:
            return by_steps
        return max(by_steps, self._place.seconds / (3600 * self._settings.hours))

    def _step(self) -> None:
        """One optimizer step over a batch, in micro-batches that weigh the same."""
        began = time.monotonic()
        place, settings = self._place, self._settings
        batch = epoch_batch(
            self._stream, settings.context, settings.batch, settings.seed, place.step
        )
        loss = 0.0
        for micro in self._micro_batches(batch):
            share = len(micro.inputs) / len(batch.inputs)
            part = mean_loss(self._model, micro, dtype=self._dtype) * share
            part.backward()
            loss += part.item()
        self._optimizers.step(rate_factor(place.step, self._done()))
        place.step += 1
        memory = min(LOSS_MEMORY, 1 - 1 / place.step)
        place.loss = memory * place.loss + (1 - memory) * loss
        self._count_time(time.monotonic() - began)

    def _micro_batches(self, batch: Windows) -> list[Windows]:
        size = self._settings.micro_batch
        inputs, targets = batch.inputs.to(self._device), batch.targets.to(self._device)
        return [
            Windows(*pair) for pair in zip(inputs.split(size), targets.split(size), strict=True)
        ]

    def _count_time(self, seconds: float) -> None:
        self._place.seconds += seconds
        speed = self._settings.batch * self._settings.context / seconds
        self._speed = RATE_MEMORY * (self._speed or speed) + (1 - RATE_MEMORY) * speed

    def _score(self, progress: PlainProgress) -> None:
        began = time.monotonic()
        result = score(self._model, self._held_out, dtype=self._dtype)
        place = self._place
        progress.say(f"step {place.step}: {result.bits_per_byte:.4f} held-out bits/byte")
        if result.bits_per_byte < place.best_bits:
            place.best_bits, place.best_step = result.bits_per_byte, place.step
            self._save(checkpoint.BEST)
        place.seconds += time.monotonic() - began

    def _standing(self) -> Standing:
        place, done = self._place, self._done()
        best = None if place.best_step == 0 else place.best_bits
        left = place.seconds * (1 - done) / done
        return Standing(place.step, self._steps, place.loss, self._speed, left, best)

    def _save(self, name: str) -> None:
        content: dict[str, Any] = {"identity": self._identity, "model": self._model.state_dict()}
        if name == checkpoint.LATEST:
            place = self._place
            content |= {
                "optimizers": self._optimizers.state_dict(),
                "random": checkpoint.random_state(self._device),
                "place": {key: getattr(place, key) for key in Place.__slots__},
            }
        checkpoint.save(self._settings.checkpoints, name, content)

    def _resume(self, progress: PlainProgress) -> None:
        saved = checkpoint.load(self._settings.checkpoints, checkpoint.LATEST, self._identity)
        if saved is None:
            return
        self._model.load_state_dict(saved["model"])
        self._optimizers.load_state_dict(saved["optimizers"])
        checkpoint.set_random_state(saved["random"], self._device)
        self._place = Place(**saved["place"])
        progress.say(f"resumed at step {self._place.step}")

    def _outcome(self) -> Outcome:
        best = checkpoint.load(self._settings.checkpoints, checkpoint.BEST, self._identity)
        assert best is not None
        place, settings = self._place, self._settings
        return Outcome(
            weights=best["model"],
            best_step=place.best_step,
            steps=place.step,
            tokens=place.step * settings.batch * settings.context,
            epochs=place.step / self._per_epoch,
            seconds=place.seconds,
        )


def device_of(settings: TrainingSettings) -> torch.device:
    """The device that the settings name."""
    if settings.device != "auto":
        return torch.device(settings.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

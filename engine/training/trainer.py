"""The run itself: steps, scores, checkpoints, from the first or from where a killed run stood.

Owns the order of things and the clock. Does not know where text comes from or where a finished
model goes.

How weights move: Muon for the blocks' matrices, AdamW for the rest, and the rate over time.

Owns optimizers and schedule. Knows nothing of data or of the clock.

What survives a kill: weights, optimizers, random state and place, written whole or not at all.

Owns the files of the checkpoint folder. Knows nothing of how a step is made.

Keeps freed memory with the process: large tensors come and go with every step.

Owns two settings of glibc's allocator. Measured: handing each freed tensor back to the system and
taking it again, page by page, more than halves the tokens per second on two cores.
"""

import ctypes
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cottention.engine.errors import ConfigurationError
from cottention.engine.models.gptj.model import CottentionForCausalLM
from cottention.engine.training.data import Windows, batches_per_epoch, epoch_batch
from cottention.engine.training.evaluate import HeldOut, score
from cottention.engine.training.forward import add_dropout, first_model, mean_loss
from cottention.engine.training.progress import PlainProgress, Standing
from cottention.engine.training.settings import TrainingSettings

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
        """Run to the end, saving on the way; an interrupt leaves the last"""
        if self._settings.resume:
            self._resume(progress)
        while self._done() < 1:
            self._step()
            progress.show(self._standing())
            last = self._done() >= 1
            if last or self._place.step % self._settings.eval_every == 0:
                self._score(progress)
            if last or self._place.step % self._settings.save_every == 0:
                self._save(LATEST)
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
            self._save(BEST)
        place.seconds += time.monotonic() - began

    def _standing(self) -> Standing:
        place, done = self._place, self._done()
        best = None if place.best_step == 0 else place.best_bits
        left = place.seconds * (1 - done) / done
        return Standing(place.step, self._steps, place.loss, self._speed, left, best)

    def _save(self, name: str) -> None:
        content: dict[str, Any] = {"identity": self._identity, "model": self._model.state_dict()}
        if name == LATEST:
            place = self._place
            content |= {
                "optimizers": self._optimizers.state_dict(),
                "random": random_state(self._device),
                "place": {key: getattr(place, key) for key in Place.__slots__},
            }
        save(self._settings.checkpoints, name, content)

    def _resume(self, progress: PlainProgress) -> None:
        saved = load(self._settings.checkpoints, LATEST, self._identity)
        if saved is None:
            return
        self._model.load_state_dict(saved["model"])
        self._optimizers.load_state_dict(saved["optimizers"])
        set_random_state(saved["random"], self._device)
        self._place = Place(**saved["place"])
        progress.say(f"resumed at step {self._place.step}")

    def _outcome(self) -> Outcome:
        best = load(self._settings.checkpoints, BEST, self._identity)
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


WARMUP_STEPS = 100
STABLE_UNTIL = 0.3
GRADIENT_NORM_LIMIT = 1.0


class Optimizers:
    """Two optimizers that step, and are saved, as one."""

    def __init__(
        self, model: CottentionForCausalLM, learning_rate: float, weight_decay: float
    ) -> None:
        matrices: list[nn.Parameter] = []
        tables: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, weight in model.named_parameters():
            in_block = name.startswith("transformer.h.")
            kind = others if weight.ndim != 2 else matrices if in_block else tables
            kind.append(weight)
        self._learning_rate = learning_rate
        self._muon = torch.optim.Muon(
            matrices,
            lr=learning_rate,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self._adam = torch.optim.AdamW(
            [
                {"params": tables, "weight_decay": weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=learning_rate,
            betas=(0.9, 0.95),
            eps=1e-10,
        )
        self._weights = [*matrices, *tables, *others]

    def step(self, factor: float) -> None:
        """Apply the gradients at `factor` of the learning rate, then drop them."""
        torch.nn.utils.clip_grad_norm_(self._weights, GRADIENT_NORM_LIMIT)
        for optimizer in self._each():
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """Both optimizers' states."""
        return [optimizer.state_dict() for optimizer in self._each()]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Take back what `state_dict` gave."""
        for optimizer, state in zip(self._each(), states, strict=True):
            optimizer.load_state_dict(state)

    def _each(self) -> Iterator[torch.optim.Optimizer]:
        yield self._muon
        yield self._adam


def rate_factor(step: int, done: float) -> float:
    """Share of the learning rate at `step`, `done` of the way: warm-up, level, linear to zero."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * min(1.0, max(0.0, (1 - done) / (1 - STABLE_UNTIL)))


LATEST = "latest.pt"
BEST = "best.pt"


def save(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Write `content` beside its place, then move it there in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{name}.{os.getpid()}.unfinished"
    torch.save(content, unfinished)
    os.replace(unfinished, folder / name)


def load(folder: Path, name: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The saved content, or None where nothing was saved.

    Raises ConfigurationError where the file is of a run with another `identity`.
    """
    path = folder / name
    if not path.exists():
        return None
    content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    found = content["identity"]
    differing = sorted(key for key in identity if found.get(key) != identity[key])
    if differing:
        raise ConfigurationError(
            f"{path} is of another run ({', '.join(differing)} differ):"
            " give another --checkpoints folder, or --no-resume"
        )
    return content


def random_state(device: torch.device) -> list[Tensor]:
    """Torch's generators, for `set_random_state`."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    """Put the generators back to where `random_state` found them."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD_BYTES = 256 << 20
NEVER_TRIM = 2**31 - 1


def keep_freed_memory() -> None:
    """Tell glibc to serve large blocks from its own heap; does nothing on other systems."""
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, NEVER_TRIM)
    mallopt(M_TOP_PAD, TOP_PAD_BYTES)

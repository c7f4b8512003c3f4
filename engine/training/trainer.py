"""A training run: optimizer steps, scores and checkpoints, resumable from the last checkpoint.

Matrices of the blocks are optimized by Muon, the other weights by AdamW, under one learning-rate
schedule. A checkpoint is replaced atomically and has all that a resumed run needs to end with the
same weights: weights, optimizers, random generators and position.
"""

import ctypes
import os
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cottention.engine.errors import ConfigurationError
from cottention.engine.models.gptj.model import map_weight
from cottention.engine.training.data import Windows, batches_per_epoch, training_batch
from cottention.engine.training.evaluate import HeldOut, score
from cottention.engine.training.forward import add_dropout, initial_model, mean_loss
from cottention.engine.training.progress import PlainProgress, TrainingStatus
from cottention.engine.training.settings import TrainingSettings

LOSS_DECAY = 0.98
SPEED_DECAY = 0.9
"""Decay per step of the running averages of loss and speed."""

WARMUP_STEPS = 100
DECAY_FROM = 0.3
"""Fraction of the run that is done when the learning rate begins to fall."""

MAX_GRAD_NORM = 1.0

LATEST = "latest.pt"
BEST = "best.pt"

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD_BYTES = 256 << 20
MAX_INT = 2**31 - 1
"""Parameters of glibc's mallopt, and their values."""

IDENTITY = (
    "seed",
    "attention",
    "num_random_features",
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
"""Settings that must be the same in a resumed run."""


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The best weights of a finished run, and the length of the run."""

    weights: dict[str, Tensor]
    best_step: int
    steps: int
    tokens: int
    epochs: float
    seconds: float


@dataclass(slots=True)
class RunState:
    """Progress of a run, as saved in a checkpoint."""

    step: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    best_step: int = 0
    best_bits: float = float("inf")


class Trainer:
    """One training run over a token stream int64 [N]."""

    def __init__(
        self, settings: TrainingSettings, stream: Tensor, held_out: HeldOut, corpus_sha256: str
    ) -> None:
        self._settings, self._stream, self._held_out = settings, stream, held_out
        self._device = training_device(settings)
        self._dtype = torch.bfloat16
        self._identity = {name: getattr(settings, name) for name in IDENTITY}
        self._identity["corpus"] = corpus_sha256
        torch.manual_seed(settings.seed)
        self.model_config = settings.model_config(end_of_text=int(stream[0]))
        self._model = initial_model(self.model_config, settings.begin_with)
        add_dropout(self._model, settings.dropout)
        self._model.to(self._device).train()
        self._optimizers = Optimizers(self._model, settings.learning_rate, settings.weight_decay)
        self._per_epoch = batches_per_epoch(stream, settings.context, settings.batch)
        self._steps = settings.steps or round(settings.epochs * self._per_epoch)
        self._state = RunState()
        self._speed = 0.0

    def train(self, progress: PlainProgress) -> TrainingResult:
        """Train to the end and save checkpoints; resume from the last one if settings allow.

        Raises ConfigurationError if that checkpoint belongs to a run with other settings or text.
        """
        if self._settings.resume:
            self._resume(progress)
        while self._done() < 1:
            self._step()
            progress.update(self._status())
            last = self._done() >= 1
            if last or self._state.step % self._settings.eval_every == 0:
                self._score(progress)
            if last or self._state.step % self._settings.save_every == 0:
                self._save(LATEST)
        return self._result()

    def _done(self) -> float:
        """Fraction of the run that is done: of its steps or of its hours, whichever is larger."""
        by_steps = self._state.step / self._steps
        if self._settings.hours is None:
            return by_steps
        return max(by_steps, self._state.seconds / (3600 * self._settings.hours))

    def _step(self) -> None:
        """One optimizer step on a batch, in micro-batches weighted by their size."""
        began = time.monotonic()
        state, settings = self._state, self._settings
        batch = training_batch(
            self._stream, settings.context, settings.batch, settings.seed, state.step
        )
        loss = 0.0
        for micro in self._micro_batches(batch):
            share = len(micro.inputs) / len(batch.inputs)
            part = mean_loss(self._model, micro, dtype=self._dtype) * share
            part.backward()
            loss += part.item()
        self._optimizers.step(learning_rate_factor(state.step, self._done()))
        state.step += 1
        memory = min(LOSS_DECAY, 1 - 1 / state.step)
        state.loss = memory * state.loss + (1 - memory) * loss
        self._count_time(time.monotonic() - began)

    def _micro_batches(self, batch: Windows) -> list[Windows]:
        size = self._settings.micro_batch
        inputs, targets = batch.inputs.to(self._device), batch.targets.to(self._device)
        return [
            Windows(*pair) for pair in zip(inputs.split(size), targets.split(size), strict=True)
        ]

    def _count_time(self, seconds: float) -> None:
        self._state.seconds += seconds
        speed = self._settings.batch * self._settings.context / seconds
        self._speed = SPEED_DECAY * (self._speed or speed) + (1 - SPEED_DECAY) * speed

    def _score(self, progress: PlainProgress) -> None:
        began = time.monotonic()
        result = score(self._model, self._held_out, dtype=self._dtype)
        state = self._state
        progress.log(f"step {state.step}: {result.bits_per_byte:.4f} held-out bits/byte")
        if result.bits_per_byte < state.best_bits:
            state.best_bits, state.best_step = result.bits_per_byte, state.step
            self._save(BEST)
        state.seconds += time.monotonic() - began

    def _status(self) -> TrainingStatus:
        state, done = self._state, self._done()
        best = None if state.best_step == 0 else state.best_bits
        left = state.seconds * (1 - done) / done
        return TrainingStatus(state.step, self._steps, state.loss, self._speed, left, best)

    def _save(self, name: str) -> None:
        content: dict[str, Any] = {"identity": self._identity, "model": self._model.state_dict()}
        if name == LATEST:
            state = self._state
            content |= {
                "optimizers": self._optimizers.state_dict(),
                "random": random_state(self._device),
                "state": {key: getattr(state, key) for key in RunState.__slots__},
            }
        save(self._settings.checkpoints, name, content)

    def _resume(self, progress: PlainProgress) -> None:
        saved = load(self._settings.checkpoints, LATEST, self._identity)
        if saved is None:
            return
        self._model.load_state_dict(saved["model"])
        self._optimizers.load_state_dict(saved["optimizers"])
        set_random_state(saved["random"], self._device)
        self._state = RunState(**saved["state"])
        progress.log(f"resumed at step {self._state.step}")

    def _result(self) -> TrainingResult:
        best = load(self._settings.checkpoints, BEST, self._identity)
        assert best is not None
        state, settings = self._state, self._settings
        return TrainingResult(
            weights=best["model"],
            best_step=state.best_step,
            steps=state.step,
            tokens=state.step * settings.batch * settings.context,
            epochs=state.step / self._per_epoch,
            seconds=state.seconds,
        )


def training_device(settings: TrainingSettings) -> torch.device:
    """The device of the settings; "auto" is CUDA if available, otherwise the CPU."""
    if settings.device != "auto":
        return torch.device(settings.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


IN_BLOCK = re.compile(r"(^|\.)(h|layer)\.\d+\.")
"""In the name of a weight: it belongs to a block of a GPT-J or to a layer of a BERT."""


class Optimizers:
    """Muon and AdamW, stepped and saved as one.

    map_rate and map_weight_decay, for comparisons: the learning rate of the attention's own weights
    (Cottention's m) as a multiple of `learning_rate`, and their weight decay.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        weight_decay: float,
        *,
        map_rate: float = 1.0,
        map_weight_decay: float = 0.0,
    ) -> None:
        matrices: list[nn.Parameter] = []
        tables: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        own: list[nn.Parameter] = []
        is_apart = (map_rate, map_weight_decay) != (1.0, 0.0)
        for name, weight in model.named_parameters():
            if is_apart and map_weight(name) is not None:
                own.append(weight)
                continue
            in_block = IN_BLOCK.search(name) is not None
            kind = others if weight.ndim != 2 else matrices if in_block else tables
            kind.append(weight)
        apart = {"params": own, "weight_decay": map_weight_decay, "rate": map_rate}
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
                *([apart] if own else []),
            ],
            lr=learning_rate,
            betas=(0.9, 0.95),
            eps=1e-10,
        )
        self._learning_rate = learning_rate
        self._weights = [*matrices, *tables, *others, *own]

    def step(self, factor: float) -> None:
        """Apply the gradients with `factor` times the learning rate, then clear them."""
        torch.nn.utils.clip_grad_norm_(self._weights, MAX_GRAD_NORM)
        for optimizer in self._each():
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate * group.get("rate", 1.0) * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """The states of both optimizers."""
        return [optimizer.state_dict() for optimizer in self._each()]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restore the result of `state_dict`."""
        for optimizer, state in zip(self._each(), states, strict=True):
            optimizer.load_state_dict(state)

    def _each(self) -> Iterator[torch.optim.Optimizer]:
        yield self._muon
        yield self._adam


def learning_rate_factor(step: int, done: float, warmup_steps: int = WARMUP_STEPS) -> float:
    """Learning rate at `step`, as a fraction of the peak: warm-up, constant, linear to zero.

    done: fraction of the run that is done.
    """
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    return warm * min(1.0, max(0.0, (1 - done) / (1 - DECAY_FROM)))


def save(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Write `content` to a temporary file, then replace folder / name by it."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{name}.{os.getpid()}.unfinished"
    torch.save(content, unfinished)
    os.replace(unfinished, folder / name)


def load(folder: Path, name: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The saved content, or None if there is no such file.

    Raises ConfigurationError if the file belongs to a run with another `identity`.
    """
    path = folder / name
    if not path.exists():
        return None
    content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    found = content["identity"]
    differing = sorted(key for key in identity if found.get(key) != identity[key])
    if differing:
        raise ConfigurationError(
            f"{path} belongs to another run ({', '.join(differing)} differ):"
            " use another --checkpoints folder, or --no-resume"
        )
    return content


def random_state(device: torch.device) -> list[Tensor]:
    """States of torch's random generators, for `set_random_state`."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    """Restore the generators to a result of `random_state`."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory in the process; no effect with other C libraries.

    Tensors of a step are large and are freed with it. Returning them to the system and faulting
    them in again, page by page, more than halves the tokens per second on two cores.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, MAX_INT)
    mallopt(M_TOP_PAD, TOP_PAD_BYTES)

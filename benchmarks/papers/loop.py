"""One training loop for all experiments: steps, checkpoints, and what a run has cost."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cottention.engine.training.trainer import (
    Optimizers,
    learning_rate_factor,
    load,
    random_state,
    save,
    set_random_state,
)

CHECKPOINT = "latest.pt"
SAVE_EVERY = 50
LOSS_DECAY = 0.98


@dataclass(frozen=True, slots=True)
class Schedule:
    """Optimizers and length of a run.

    map_rate, map_weight_decay: of the attention's own weights, as in `Optimizers`.
    """

    steps: int
    learning_rate: float
    weight_decay: float = 0.3
    warmup_steps: int = 50
    map_rate: float = 1.0
    map_weight_decay: float = 0.0


class Task(Protocol):
    """What is trained: `loss` of a step must depend on the step and the weights alone."""

    model: nn.Module

    def loss(self, step: int) -> Tensor:
        """The differentiable loss of one batch."""
        ...


@dataclass(slots=True)
class Progress:
    """Where a run stands. seconds: of this process's CPU, not of the clock."""

    step: int = 0
    cpu_seconds: float = 0.0
    loss: float = 0.0


def train(task: Task, schedule: Schedule, folder: Path) -> Progress:
    """Train to the end, from the checkpoint in `folder` if there is one."""
    device = torch.device("cpu")
    optimizers = Optimizers(
        task.model,
        schedule.learning_rate,
        schedule.weight_decay,
        map_rate=schedule.map_rate,
        map_weight_decay=schedule.map_weight_decay,
    )
    identity = asdict(schedule)
    progress = Progress()
    saved = load(folder, CHECKPOINT, identity)
    if saved is not None:
        task.model.load_state_dict(saved["model"])
        optimizers.load_state_dict(saved["optimizers"])
        set_random_state(saved["random"], device)
        progress = Progress(**saved["progress"])
    task.model.train()
    while progress.step < schedule.steps:
        began = time.process_time()
        loss = task.loss(progress.step)
        loss.backward()  # type: ignore[no-untyped-call]
        done = progress.step / schedule.steps
        optimizers.step(learning_rate_factor(progress.step, done, schedule.warmup_steps))
        progress.step += 1
        memory = min(LOSS_DECAY, 1 - 1 / progress.step)
        progress.loss = memory * progress.loss + (1 - memory) * loss.item()
        progress.cpu_seconds += time.process_time() - began
        if progress.step % SAVE_EVERY == 0:
            _save(folder, identity, task.model, optimizers, progress)
    task.model.eval()
    return progress


def _save(
    folder: Path,
    identity: dict[str, Any],
    model: nn.Module,
    optimizers: Optimizers,
    progress: Progress,
) -> None:
    content = {
        "identity": identity,
        "model": model.state_dict(),
        "optimizers": optimizers.state_dict(),
        "random": random_state(torch.device("cpu")),
        "progress": asdict(progress),
    }
    save(folder, CHECKPOINT, content)


def num_parameters(model: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(weight.numel() for weight in model.parameters())

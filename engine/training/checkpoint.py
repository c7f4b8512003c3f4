"""What survives a kill: weights, optimizers, random state and place, written whole or not at all.

Owns the files of the checkpoint folder. Knows nothing of how a step is made.
"""

import os
from pathlib import Path
from typing import Any

import torch
from cottention.engine.errors import ConfigurationError
from torch import Tensor

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

"""What is told of a finished run, as training.json has it.

Names the kind of machine, never this one: no paths, no host names.
"""

import json
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from cottention.engine.training.corpus import Corpus, SourceFile
from cottention.engine.training.loop import Outcome
from cottention.engine.training.rounding import Rounded
from cottention.engine.training.score import Score
from cottention.engine.training.settings import TrainingSettings


def facts_of(
    settings: TrainingSettings,
    corpus: Corpus,
    outcome: Outcome,
    rounded: Rounded,
    code_score: Score,
    arguments: Sequence[str],
) -> dict[str, Any]:
    """Everything that is told of a run, under the names of training.json."""
    return {
        "command": shlex.join(["python", "-m", "cottention.engine.training", *arguments]),
        "began_with": _beginning(settings.begin_with),
        "corpus": _corpus_facts(settings, corpus),
        "model": {
            "parameters": sum(weight.numel() for weight in rounded.weights.values()),
            "attention": settings.attention,
            "dtype": rounded.dtype,
            "context": settings.context,
            "seed": settings.seed,
        },
        "training": {
            "steps": outcome.steps,
            "best_step": outcome.best_step,
            "num_scores": -(-outcome.steps // settings.eval_every),
            "tokens": outcome.tokens,
            "epochs": round(outcome.epochs, 2),
            "hours": round(outcome.seconds / 3600, 2),
            "machine": machine(settings),
            "python": python_version(),
            "torch": torch.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "held_out_bits_per_byte": {
            "total": round(rounded.score.bits_per_byte, 4),
            "by_position": _rounded(rounded.score.by_position),
            "without_character_tables": round(code_score.bits_per_byte, 4),
            "by_position_without_character_tables": _rounded(code_score.by_position),
        },
    }


def _beginning(folder: Path | None) -> dict[str, Any] | None:
    """What is told of the run that made the first weights."""
    told = folder / "training.json" if folder else None
    if told is None or not told.is_file():
        return None
    facts: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
    return facts


def python_version() -> str:
    """Name and version of the running interpreter."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def machine(settings: TrainingSettings) -> str:
    """The kind of processor and how many of it were used."""
    if settings.device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    kind = _processor_name() or platform.machine()
    return f"{settings.threads or os.cpu_count()} cores of {kind}"


def _rounded(by_position: dict[str, float]) -> dict[str, float]:
    return {key: round(bits, 4) for key, bits in by_position.items()}


def _processor_name() -> str | None:
    """As Linux tells it, None elsewhere."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None)


def _corpus_facts(settings: TrainingSettings, corpus: Corpus) -> dict[str, Any]:
    return {
        "text": "a given folder" if settings.corpus else f"standard library of {python_version()}",
        "sha256": corpus.sha256,
        "training_files": len(corpus.training),
        "training_bytes": _bytes(corpus.training),
        "held_out_files": len(corpus.held_out),
        "held_out_bytes": _bytes(corpus.held_out),
    }


def _bytes(files: Sequence[SourceFile]) -> int:
    return sum(file.num_bytes for file in files)

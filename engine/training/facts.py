"""What is told of a finished run: training.json for programs, the model card for people.

Owns the words. Names the kind of machine, never this one: no paths, no host names.
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

from engine.training.corpus import Corpus, SourceFile
from engine.training.loop import Outcome
from engine.training.rounding import Rounded
from engine.training.score import Score
from engine.training.settings import TrainingSettings

CARD = """\
---
license: apache-2.0
language: code
library_name: cottention-server
pipeline_tag: text-generation
tags: [cottention, linear-attention, python]
---
# {name}

A small causal Cottention model (arXiv 2409.18747: cosine similarity in place of softmax, a GPT-J
block around it) that continues Python source text. It ships with cottention-server so that the
server runs without a download. It is a demonstration: its text looks like Python, and means little.

| | |
|---|---|
{rows}

Bits per byte: every held-out file once, in non-overlapping windows of {context} tokens, each from a
zero state; the weights as shipped, computed in float32. The best of {num_scores} scores taken on
these files in training chose the checkpoint. The character tables in `encodings/` are so much
alike that the held-out ones hardly surprise: the second number is the one to expect of code. By
position of the token in its window:

| tokens | bits per byte | without `encodings/` |
|---|---|---|
{positions}

## Made with

    {command}

The text is the standard library of {python}: `*.py`, test directories and files written by the
build left out, one file in twenty held out by the SHA-256 of its path. SHA-256 over paths and
contents: `{corpus_sha256}`.
{python} and its library are under the Python Software Foundation License; the weights and the
tokenizer are under the licence of cottention-server (Apache-2.0).
"""


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
        "command": shlex.join(["python", "-m", "engine.training", *arguments]),
        "began_with": _beginning(settings.begin_with),
        "corpus": _corpus_facts(settings, corpus),
        "model": {
            "parameters": sum(weight.numel() for weight in rounded.weights.values()),
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


def card_of(name: str, facts: dict[str, Any]) -> str:
    """The model card, in Markdown."""
    model, corpus, training = facts["model"], facts["corpus"], facts["training"]
    bits = facts["held_out_bits_per_byte"]
    without = bits["by_position_without_character_tables"]
    positions = [
        f"| {key} | {value:.3f} | {without.get(key, float('nan')):.3f} |"
        for key, value in bits["by_position"].items()
    ]
    rows = {
        "held-out bits per byte": f"**{bits['total']:.3f}**",
        "the same without `encodings/`": f"{bits['without_character_tables']:.3f}",
        "parameters": f"{model['parameters']:,} ({model['dtype']})",
        "trained on": f"{corpus['training_bytes']:,} bytes, {corpus['training_files']} files",
        "held out": f"{corpus['held_out_bytes']:,} bytes, {corpus['held_out_files']} files",
        "steps": f"{training['steps']:,} (the weights are those of step {training['best_step']:,})",
        "tokens": f"{training['tokens']:,} ({training['epochs']} passes)",
        "time": f"{training['hours']} hours on {training['machine']}",
    }
    if facts.get("began_with"):
        rows["began with"] = _run_in_words(facts["began_with"])
    return CARD.format(
        name=name,
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        positions="\n".join(positions),
        context=model["context"],
        num_scores=training["num_scores"],
        command="\n    ".join(_commands(facts)),
        python=training["python"],
        corpus_sha256=corpus["sha256"],
    )


def _beginning(folder: Path | None) -> dict[str, Any] | None:
    """What is told of the run that made the first weights."""
    told = folder / "training.json" if folder else None
    if told is None or not told.is_file():
        return None
    facts: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
    return facts


def _run_in_words(facts: dict[str, Any]) -> str:
    training, bits = facts["training"], facts["held_out_bits_per_byte"]
    return (
        f"the weights of an earlier run: {training['steps']:,} steps, {training['tokens']:,} tokens"
        f" ({training['epochs']} passes), {training['hours']} hours, {bits['total']:.3f} bits per byte"
    )


def _commands(facts: dict[str, Any] | None) -> list[str]:
    """The commands of all runs that led here, the first one first."""
    return [*_commands(facts.get("began_with")), facts["command"]] if facts else []


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

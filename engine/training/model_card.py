"""What is published about a training run: training.json and the model card, in Markdown.

They name the kind of machine, but no paths and no host names.
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

from cottention.engine.models.gptj.attention_kinds import ATTENTION_KINDS
from cottention.engine.training.data import Corpus, SourceFile
from cottention.engine.training.evaluate import Score
from cottention.engine.training.export import HalfPrecision
from cottention.engine.training.settings import TrainingSettings
from cottention.engine.training.trainer import TrainingResult


def training_facts(
    settings: TrainingSettings,
    corpus: Corpus,
    outcome: TrainingResult,
    rounded: HalfPrecision,
    code_score: Score,
    arguments: Sequence[str],
) -> dict[str, Any]:
    """Contents of training.json.

    `arguments` is the command line of the run; `code_score` the score without character tables.
    """
    return {
        "command": shlex.join(["python", "-m", "cottention.engine.training", *arguments]),
        "began_with": _facts_of_start(settings.begin_with),
        "corpus": _corpus_facts(settings, corpus),
        "model": {
            "parameters": sum(weight.numel() for weight in rounded.model.parameters()),
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
            "by_position": _rounded_figures(rounded.score.by_position),
            "without_character_tables": round(code_score.bits_per_byte, 4),
            "by_position_without_character_tables": _rounded_figures(code_score.by_position),
        },
    }


def _facts_of_start(folder: Path | None) -> dict[str, Any] | None:
    """training.json of the model that the run started from, if there is one."""
    path = folder / "training.json" if folder else None
    if path is None or not path.is_file():
        return None
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts


def python_version() -> str:
    """Name and version of the running interpreter."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def machine(settings: TrainingSettings) -> str:
    """Kind of GPU, or number and kind of the CPU cores used."""
    if settings.device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    kind = _processor_name() or platform.machine()
    return f"{settings.threads or os.cpu_count()} cores of {kind}"


def _rounded_figures(by_position: dict[str, float]) -> dict[str, float]:
    return {key: round(bits, 4) for key, bits in by_position.items()}


def _processor_name() -> str | None:
    """From Linux's /proc/cpuinfo; None elsewhere."""
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


CARD = """\
---
license: apache-2.0
language: code
library_name: cottention-server
pipeline_tag: text-generation
tags: [{tags}, python]
---
# {name}

{what} It is a demonstration: its output looks like
Python, but has little meaning.

| | |
|---|---|
{rows}

Bits per byte are measured on every held-out file once, in non-overlapping windows of {context}
tokens, each from a zero state, with the weights as published, computed in float32. The checkpoint
is the one with the best of {num_scores} scores on these files during training. The character tables
in `encodings/` resemble each other, so the held-out ones are easy to predict: the second number is
the one to expect for code. By position of the token in its window:

| tokens | bits per byte | without `encodings/` |
|---|---|---|
{positions}

## Training

    {command}

The text is the standard library of {python}: all `*.py` files except tests and files generated by
the build. One file in twenty is held out, by the SHA-256 of its path. SHA-256 over paths and
contents: `{corpus_sha256}`.

{python} and its library are under the Python Software Foundation License; the weights and the
tokenizer are under the licence of cottention-server (Apache-2.0).
"""

SHIPPED = """ It ships with cottention-server so that the
server runs without a download."""

COMPARED = """ It is for
comparison: cottention-server trains and measures it, but does not serve it."""


def model_card(name: str, facts: dict[str, Any]) -> str:
    """The model card of a folder `name`, from the contents of training.json."""
    model, corpus, training = facts["model"], facts["corpus"], facts["training"]
    bits = facts["held_out_bits_per_byte"]
    attention = model.get("attention", "cottention")
    without = bits["by_position_without_character_tables"]
    positions = [
        f"| {key} | {value:.3f} | {without.get(key, float('nan')):.3f} |"
        for key, value in bits["by_position"].items()
    ]
    rows = _rows(facts)
    return CARD.format(
        name=name,
        what=_description(attention),
        tags="cottention, linear-attention" if attention == "cottention" else attention,
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        positions="\n".join(positions),
        context=model["context"],
        num_scores=training["num_scores"],
        command="\n    ".join(_commands(facts)),
        python=training["python"],
        corpus_sha256=corpus["sha256"],
    )


def _description(attention: str) -> str:
    """What the model is, in a sentence or two."""
    kind = ATTENTION_KINDS[attention]
    text = f"A small {kind.description}, in a\nGPT-J block, that continues Python source text."
    if attention == "cottention":
        return text + SHIPPED
    return text if kind.is_recurrent else text + COMPARED


def _rows(facts: dict[str, Any]) -> dict[str, str]:
    """The first table of the card."""
    model, corpus, training = facts["model"], facts["corpus"], facts["training"]
    bits = facts["held_out_bits_per_byte"]
    rows = {
        "held-out bits per byte": f"**{bits['total']:.3f}**",
        "without `encodings/`": f"{bits['without_character_tables']:.3f}",
        "parameters": f"{model['parameters']:,} ({model['dtype']})",
        "trained on": f"{corpus['training_bytes']:,} bytes, {corpus['training_files']} files",
        "held out": f"{corpus['held_out_bytes']:,} bytes, {corpus['held_out_files']} files",
        "steps": f"{training['steps']:,} (the weights are those of step {training['best_step']:,})",
        "tokens": f"{training['tokens']:,} ({training['epochs']} passes)",
        "time": f"{training['hours']} hours on {training['machine']}",
    }
    if facts.get("began_with"):
        rows["initial weights"] = _run_summary(facts["began_with"])
    return rows


def _run_summary(facts: dict[str, Any]) -> str:
    training, bits = facts["training"], facts["held_out_bits_per_byte"]
    return (
        f"an earlier run: {training['steps']:,} steps,"
        f" {training['tokens']:,} tokens ({training['epochs']} passes),"
        f" {training['hours']} hours, {bits['total']:.3f} bits per byte"
    )


def _commands(facts: dict[str, Any] | None) -> list[str]:
    """The commands of all runs that led to the model, the first one first."""
    return [*_commands(facts.get("began_with")), facts["command"]] if facts else []

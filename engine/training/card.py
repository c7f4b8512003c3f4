"""What is told of a finished run, in words: the model card. Owns the words, and no figure."""

from typing import Any

CARD = """\
---
license: apache-2.0
language: code
library_name: cottention-server
pipeline_tag: text-generation
tags: [{tags}, python]
---
# {name}

{what} It is a demonstration: its text looks like Python, and means little.

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

WHAT = {
    "cottention": """\
A small causal Cottention model (arXiv 2409.18747: cosine similarity in place of softmax, a GPT-J
block around it) that continues Python source text. It ships with cottention-server so that the
server runs without a download.""",
    "cosformer": """\
A small causal cosFormer (arXiv 2202.08791: ReLU reweighted by the cosine of the distance, a GPT-J
block around it) that continues Python source text.""",
    "linear": """\
A small causal linear transformer (arXiv 2006.16236: elu + 1 in place of softmax, a GPT-J block
around it) that continues Python source text.""",
    "softmax": """\
A small causal GPT-J with softmax attention that continues Python source text, to be compared with.
cottention-server trains and measures it and does not serve it.""",
}


def card_of(name: str, facts: dict[str, Any]) -> str:
    """The model card, in Markdown."""
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
        what=WHAT[attention],
        tags="cottention, linear-attention" if attention == "cottention" else attention,
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        positions="\n".join(positions),
        context=model["context"],
        num_scores=training["num_scores"],
        command="\n    ".join(_commands(facts)),
        python=training["python"],
        corpus_sha256=corpus["sha256"],
    )


def _rows(facts: dict[str, Any]) -> dict[str, str]:
    """The card's first table."""
    model, corpus, training = facts["model"], facts["corpus"], facts["training"]
    bits = facts["held_out_bits_per_byte"]
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
    return rows


def _run_in_words(facts: dict[str, Any]) -> str:
    training, bits = facts["training"], facts["held_out_bits_per_byte"]
    return (
        f"the weights of an earlier run: {training['steps']:,} steps,"
        f" {training['tokens']:,} tokens ({training['epochs']} passes),"
        f" {training['hours']} hours, {bits['total']:.3f} bits a byte"
    )


def _commands(facts: dict[str, Any] | None) -> list[str]:
    """The commands of all runs that led here, the first one first."""
    return [*_commands(facts.get("began_with")), facts["command"]] if facts else []

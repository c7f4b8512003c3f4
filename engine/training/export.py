"""A complete Hugging Face model folder, which other tools load too.

Owns the folder's files and their form. Knows nothing of how the weights came to be: the model card
and the facts are handed to it.

From trained float32 weights to the half-width ones that are shipped.

Owns the choice between float16 and bfloat16: the one that scores better on the held-out files, as
rounded and then computed in float32.

What is told of a finished run, in words: the model card. Owns the words, and no figure.

What is told of a finished run, as training.json has it.

Names the kind of machine, never this one: no paths, no host names.
"""

import json
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.gptj.model import CottentionForCausalLM
from cottention.engine.training.data import END_OF_TEXT, Corpus, SourceFile, end_of_text_id
from cottention.engine.training.evaluate import HeldOut, Score, score
from cottention.engine.training.settings import TrainingSettings
from cottention.engine.training.trainer import Outcome


def write_folder(
    folder: Path, config: GPTJConfig, dtype: str, weights: dict[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Write weights, configuration and tokenizer files into `folder`, which is made if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # as the other files: a package is for all to read
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    end = end_of_text_id(tokenizer)
    write_json(folder / "config.json", config_json(config, dtype, end))
    write_json(folder / "generation_config.json", generation_json(end))
    write_json(folder / "tokenizer_config.json", tokenizer_json(config, end))
    write_json(folder / "special_tokens_map.json", _special_roles())


def config_json(config: GPTJConfig, dtype: str, end: int) -> dict[str, Any]:
    """config.json: a GPT-J's, with the kind of attention named."""
    return {
        "architectures": ["GPTJForCausalLM"],
        "model_type": "gptj",
        "attention_type": config.attention_type,
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": end,
        "eos_token_id": end,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "tie_word_embeddings": False,
        "use_cache": True,
        "rotary": True,
        "vocab_size": config.vocab_size,
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_layer": config.n_layer,
        "n_inner": config.n_inner,
        "n_positions": config.n_positions,
        "rotary_dim": config.rotary_dim,
        "torch_dtype": dtype,
        **_fixed_length(config),
    }


def _fixed_length(config: GPTJConfig) -> dict[str, Any]:
    """cosFormer's M, and nothing for other kinds of attention."""
    if config.max_exact_length is None:
        return {}
    return {"cosformer_max_length": config.max_exact_length}


def generation_json(end: int) -> dict[str, Any]:
    """generation_config.json: nothing but the ids that begin and end a text."""
    return {"_from_model_config": True, "bos_token_id": end, "eos_token_id": end}


def tokenizer_json(config: GPTJConfig, end: int) -> dict[str, Any]:
    """tokenizer_config.json, for loaders that go by its class name."""
    special = {"content": END_OF_TEXT, "lstrip": False, "normalized": False}
    special |= {"rstrip": False, "single_word": False, "special": True}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(end): special},
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.n_positions,
        **_special_roles(),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented, with a line end, so that the files compare well."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _special_roles() -> dict[str, Any]:
    return {f"{role}_token": END_OF_TEXT for role in ("bos", "eos", "unk")}


HALF_WIDTHS = {"float16": torch.float16, "bfloat16": torch.bfloat16}

Weights = dict[str, Tensor]


class Rounded(NamedTuple):
    """Weights in `dtype`, the model that they make in float32, and its score."""

    dtype: str
    weights: Weights
    model: CottentionForCausalLM
    score: Score


def round_best(weights: Weights, config: GPTJConfig, held_out: HeldOut) -> Rounded:
    """The half-width form of `weights` with fewer bits per byte."""
    both = [_rounded(weights, name, config, held_out) for name in HALF_WIDTHS]
    return min(both, key=lambda rounded: rounded.score.bits_per_byte)


def _rounded(weights: Weights, name: str, config: GPTJConfig, held_out: HeldOut) -> Rounded:
    half = {key: weight.to(HALF_WIDTHS[name]).contiguous() for key, weight in weights.items()}
    model = CottentionForCausalLM(config).requires_grad_(False).eval()
    model.load_state_dict({key: weight.float() for key, weight in half.items()})
    return Rounded(name, half, model, score(model, held_out, dtype=torch.float32))


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
            "by_position": _rounded_figures(rounded.score.by_position),
            "without_character_tables": round(code_score.bits_per_byte, 4),
            "by_position_without_character_tables": _rounded_figures(code_score.by_position),
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


def _rounded_figures(by_position: dict[str, float]) -> dict[str, float]:
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

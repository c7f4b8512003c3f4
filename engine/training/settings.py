"""What a training run is told: the one declaration that its flags and defaults derive from.

Owns names, defaults and help texts. Knows nothing of what is done with them.
"""

import argparse
from collections.abc import Collection, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from cottention.engine.models.gptj.attention_kinds import ATTENTION_KINDS
from cottention.engine.models.gptj.config import GPTJConfig

SHIPPED_MODEL = Path("engine/pretrained/cottention-python-7m")


def flag(default: Any, help: str, choices: Collection[str] | None = None) -> Any:
    """A setting with its default, its help text and what it may be."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """Everything that a run depends on. Each becomes a flag `--like-this`."""

    output: Path = flag(SHIPPED_MODEL, "folder for the finished model")
    checkpoints: Path = flag(Path("checkpoints/training"), "folder that a killed run resumes from")
    corpus: Path | None = flag(None, "folder of Python files (default: the standard library)")
    begin_with: Path | None = flag(None, "model folder whose weights are the first ones")
    cut_every: int = flag(
        0,
        "cut texts at random places, so many characters apart on average, and tokenise the pieces:"
        " then a prompt that ends inside a word or behind a space is nothing new; 0 cuts none",
    )
    epochs: float = flag(12.0, "passes over the training text")
    steps: int | None = flag(None, "optimizer steps, instead of --epochs")
    hours: float | None = flag(None, "time limit: the learning rate ends by then at the latest")
    context: int = flag(1024, "tokens in a window, and the model's n_positions")
    attention: str = flag(
        "cottention",
        "kind of attention; softmax is there to be compared with and cannot be served",
        choices=ATTENTION_KINDS,
    )
    rotary_dim: int | None = flag(None, "channels of a head that rotary turns (default: all)")
    layers: int = flag(6, "blocks")
    width: int = flag(256, "channels; the MLP has four times as many")
    heads: int = flag(4, "heads, which share the channels")
    vocab_size: int = flag(4096, "ids of the tokenizer")
    batch_tokens: int = flag(8192, "tokens in an optimizer step")
    micro_batch_tokens: int = flag(4096, "tokens that go through the model at once")
    learning_rate: float = flag(3e-3, "peak learning rate")
    weight_decay: float = flag(0.3, "decay of matrices and tables, times the learning rate")
    dropout: float = flag(0.05, "share of channels dropped in training")
    eval_every: int = flag(400, "steps between scores on the held-out files")
    save_every: int = flag(100, "steps between checkpoints")
    seed: int = flag(1, "seed of first weights, windows and dropout")
    device: str = flag("auto", "cpu, cuda, or auto: CUDA if there is one")
    threads: int | None = flag(None, "CPU threads; None: torch's own choice")
    resume: bool = flag(True, "go on from a checkpoint where there is one")

    @property
    def batch(self) -> int:
        """Windows in an optimizer step."""
        return max(1, self.batch_tokens // self.context)

    @property
    def micro_batch(self) -> int:
        """Windows that go through the model at once."""
        return max(1, min(self.batch, self.micro_batch_tokens // self.context))

    def model_config(self, end_of_text: int) -> GPTJConfig:
        """The model's shape: rotary over whole heads whatever the attention, M the context."""
        rotary_dim = self.width // self.heads if self.rotary_dim is None else self.rotary_dim
        return GPTJConfig(
            vocab_size=self.vocab_size,
            n_embd=self.width,
            n_layer=self.layers,
            n_head=self.heads,
            n_positions=self.context,
            rotary_dim=rotary_dim,
            n_inner=4 * self.width,
            eos_token_ids=(end_of_text,),
            attention_type=self.attention,
            cosformer_max_length=self.context if self.attention == "cosformer" else None,
        )


def parse(arguments: Sequence[str]) -> TrainingSettings:
    """Settings from command line arguments; argparse ends the program on wrong ones."""
    parser = argparse.ArgumentParser(
        prog="python -m cottention.engine.training",
        description="Train a small Cottention model on Python source text.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for item in fields(TrainingSettings):
        assert item.default is not MISSING
        name, text = "--" + item.name.replace("_", "-"), item.metadata["help"]
        if item.type is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(name, action=action, default=item.default, help=text)
        else:
            kind, choices = _plain(item.type), item.metadata["choices"]
            parser.add_argument(name, type=kind, choices=choices, default=item.default, help=text)
    return TrainingSettings(**vars(parser.parse_args(arguments)))


def _plain(kind: Any) -> Any:
    """`int | None` is read as int."""
    return get_args(kind)[0] if get_args(kind) else kind

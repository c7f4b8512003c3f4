"""Settings of a training run: flags, variables `COTTENTION_TRAINING_*` and a TOML file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cottention.engine.errors import ConfigurationError
from cottention.engine.models.gptj.attention_kinds import ATTENTION_KINDS
from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.gptj.feature_maps.random_features import RandomFeatures
from cottention.engine.settings.command_line import OneLineParser, add_config_flag, add_flags
from cottention.engine.settings.declaration import (
    MAX_THREADS,
    check_settings,
    setting,
    settings_of,
)
from cottention.engine.settings.sources import (
    CONFIG_NAME,
    VARIABLE_PREFIX,
    Resolved,
    Sources,
    variable_of,
)

SHIPPED_MODEL = Path("engine/pretrained/cottention-python-7m")

TRAINING_PREFIX = VARIABLE_PREFIX + "TRAINING_"
"""Of the variables: a server and a training run on one machine share none."""


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """Everything that a run depends on."""

    output: Path = setting(SHIPPED_MODEL, "folder to write the finished model to")
    checkpoints: Path = setting(
        Path("checkpoints/training"), "folder of checkpoints, from which an interrupted run resumes"
    )
    corpus: Path | None = setting(
        None, "folder of Python files to train on", unset="the standard library"
    )
    begin_with: Path | None = setting(
        None, "model folder to take the first weights from", unset="random weights"
    )
    cut_every: int = setting(
        0,
        "mean distance of random cuts in the text before it is tokenized, so that prompts may end"
        " inside a word; 0 makes no cuts",
        minimum=0,
        unit="characters",
    )
    epochs: float = setting(12.0, "passes over the training text", minimum=0)
    steps: int | None = setting(
        None, "number of optimizer steps", unset="as --epochs says", minimum=1
    )
    hours: float | None = setting(
        None,
        "time limit, by which the learning rate has decayed",
        unset="unlimited",
        minimum=0,
        unit="hours",
    )
    context: int = setting(
        1024, "length of a training window, the model's n_positions", minimum=2, unit="tokens"
    )
    attention: str = setting(
        "cottention",
        "kind of attention; softmax is for comparison and cannot be served",
        choices=ATTENTION_KINDS,
    )
    num_random_features: int | None = setting(
        None,
        "random features per head, of performer and rfa",
        unset="as many as make keys twice as wide as a head",
        minimum=1,
    )
    rotary_dim: int | None = setting(None, "rotary channels per head", unset="all", minimum=0)
    layers: int = setting(6, "number of layers", minimum=1)
    width: int = setting(256, "hidden size; the MLP is four times as wide", minimum=1)
    heads: int = setting(4, "number of attention heads", minimum=1)
    vocab_size: int = setting(4096, "vocabulary size of the tokenizer", minimum=1)
    batch_tokens: int = setting(8192, "batch size of an optimizer step", minimum=1, unit="tokens")
    micro_batch_tokens: int = setting(
        4096, "batch size of a forward and backward pass", minimum=1, unit="tokens"
    )
    learning_rate: float = setting(3e-3, "peak learning rate", minimum=0)
    weight_decay: float = setting(0.3, "weight decay of matrices and embeddings", minimum=0)
    dropout: float = setting(0.05, "dropout probability", minimum=0, maximum=1)
    eval_every: int = setting(
        400, "interval between evaluations on held-out files", minimum=1, unit="steps"
    )
    save_every: int = setting(100, "interval between checkpoints", minimum=1, unit="steps")
    seed: int = setting(1, "random seed of weights, windows and dropout")
    device: str = setting("auto", "cpu, cuda, or auto, which uses CUDA where it is available")
    threads: int | None = setting(
        None, "number of CPU threads", unset="chosen by torch", minimum=1, maximum=MAX_THREADS
    )
    resume: bool = setting(True, "resume from a checkpoint where there is one")

    def __post_init__(self) -> None:
        check_settings(self)

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
        is_random = isinstance(ATTENTION_KINDS[self.attention], RandomFeatures)
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
            num_random_features=self.num_random_features if is_random else None,
        )


TRAINING_VARIABLES = tuple(
    variable_of(name, TRAINING_PREFIX)
    for name in (CONFIG_NAME, *(each.name for each in settings_of(TrainingSettings)))
)


def parse(arguments: Sequence[str], environ: Mapping[str, str]) -> Resolved[TrainingSettings]:
    """Settings and where each comes from; a mistake ends the program with one line and status 2."""
    parser = OneLineParser(
        prog="python -m cottention.engine.training",
        description="Train a small Cottention model on Python source text.",
        epilog="A flag takes precedence over its variable, named in [brackets], and a variable over"
        " the file.",
        allow_abbrev=False,
    )
    add_config_flag(parser, TRAINING_PREFIX)
    add_flags(parser, TrainingSettings, "settings", TRAINING_PREFIX)
    given = parser.parse_args(arguments)
    names = [each.name for each in settings_of(TrainingSettings)]
    try:
        return Sources.of(given, environ, names, TRAINING_PREFIX).read(TrainingSettings)
    except ConfigurationError as error:
        parser.error(str(error))

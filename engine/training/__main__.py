"""`python -m cottention.engine.training`: trains a model on text and writes a model folder."""

import os
import sys
from collections.abc import Sequence

import torch

from cottention.engine.errors import CottentionError
from cottention.engine.settings.command_line import to_arguments
from cottention.engine.settings.sources import unknown_variables
from cottention.engine.standard_streams import protect_standard_streams
from cottention.engine.training.data import (
    read_corpus,
    standard_library,
    token_stream,
    train_tokenizer,
    without_character_tables,
)
from cottention.engine.training.evaluate import PROMPTS, HeldOut, greedy_text, score
from cottention.engine.training.export import to_half_precision, write_folder, write_json
from cottention.engine.training.model_card import model_card, training_facts
from cottention.engine.training.progress import PlainProgress, open_progress
from cottention.engine.training.settings import (
    TRAINING_PREFIX,
    TRAINING_VARIABLES,
    TrainingSettings,
    parse,
)
from cottention.engine.training.trainer import Trainer, keep_freed_memory


def main(arguments: Sequence[str]) -> int:
    """Train with the settings from `arguments`; returns the exit status."""
    resolved = parse(arguments, os.environ)
    settings = resolved.value
    for message in unknown_variables(os.environ, TRAINING_VARIABLES, TRAINING_PREFIX):
        print(f"warning: {message}", file=sys.stderr)
    keep_freed_memory()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        with open_progress() as progress:
            train(settings, to_arguments(resolved), progress)
    except CottentionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command to resume from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def train(settings: TrainingSettings, arguments: Sequence[str], progress: PlainProgress) -> None:
    """Read the corpus, train tokenizer and model, write the folder, and print sample texts.

    arguments: the flags that give these settings, for the model's card.
    """
    corpus = read_corpus(settings.corpus or standard_library())
    tokenizer = train_tokenizer((file.text for file in corpus.training), settings.vocab_size)
    held_out = HeldOut.of(tokenizer, corpus.held_out, settings.context)
    stream = token_stream(tokenizer, corpus.training, settings.cut_every, settings.seed)
    progress.log(f"{len(corpus.training)} files, {len(stream):,} tokens; corpus {corpus.sha256}")
    trainer = Trainer(settings, stream, held_out, corpus.sha256)
    outcome = trainer.train(progress)
    rounded = to_half_precision(outcome.weights, trainer.model_config, held_out)
    write_folder(settings.output, trainer.model_config, rounded.dtype, rounded.weights, tokenizer)
    code = HeldOut.of(tokenizer, without_character_tables(corpus.held_out), settings.context)
    code_score = score(rounded.model, code, dtype=torch.float32)
    facts = training_facts(settings, corpus, outcome, rounded, code_score, arguments)
    write_json(settings.output / "training.json", facts)
    card = model_card(settings.output.name, facts)
    (settings.output / "README.md").write_text(card, encoding="utf-8")
    progress.log(f"{settings.output}: {rounded.score.bits_per_byte:.4f} held-out bits/byte")
    for prompt in PROMPTS:
        progress.log("---\n" + greedy_text(rounded.model, tokenizer, prompt))


if __name__ == "__main__":
    protect_standard_streams()
    raise SystemExit(main(sys.argv[1:]))

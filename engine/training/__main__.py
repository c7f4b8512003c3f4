"""`python -m cottention.engine.training`: text in, model folder out."""

import os
import sys
from collections.abc import Sequence

import torch

from cottention.engine.errors import CottentionError
from cottention.engine.settings.command_line import to_arguments
from cottention.engine.settings.sources import unknown_variables
from cottention.engine.training.data import (
    read_corpus,
    standard_library,
    token_stream,
    train_tokenizer,
    without_tables,
)
from cottention.engine.training.evaluate import PROMPTS, HeldOut, greedy_text, score
from cottention.engine.training.export import (
    card_of,
    facts_of,
    round_best,
    write_folder,
    write_json,
)
from cottention.engine.training.progress import PlainProgress, open_progress
from cottention.engine.training.settings import (
    TRAINING_PREFIX,
    TRAINING_VARIABLES,
    TrainingSettings,
    parse,
)
from cottention.engine.training.trainer import Run, keep_freed_memory


def main(arguments: Sequence[str]) -> int:
    """Train as the arguments say; returns the exit status."""
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
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def train(settings: TrainingSettings, arguments: Sequence[str], progress: PlainProgress) -> None:
    """Read the corpus, train tokenizer and model, and write the model folder.

    arguments: the flags that give these settings, for the model's card.
    """
    corpus = read_corpus(settings.corpus or standard_library())
    tokenizer = train_tokenizer((file.text for file in corpus.training), settings.vocab_size)
    held_out = HeldOut.of(tokenizer, corpus.held_out, settings.context)
    stream = token_stream(tokenizer, corpus.training, settings.cut_every, settings.seed)
    progress.say(f"{len(corpus.training)} files, {len(stream):,} tokens; corpus {corpus.sha256}")
    run = Run(settings, stream, held_out, corpus.sha256)
    outcome = run.train(progress)
    rounded = round_best(outcome.weights, run.model_config, held_out)
    write_folder(settings.output, run.model_config, rounded.dtype, rounded.weights, tokenizer)
    code = HeldOut.of(tokenizer, without_tables(corpus.held_out), settings.context)
    code_score = score(rounded.model, code, dtype=torch.float32)
    facts = facts_of(settings, corpus, outcome, rounded, code_score, arguments)
    write_json(settings.output / "training.json", facts)
    card = card_of(settings.output.name, facts)
    (settings.output / "README.md").write_text(card, encoding="utf-8")
    progress.say(f"{settings.output}: {rounded.score.bits_per_byte:.4f} held-out bits/byte")
    for prompt in PROMPTS:
        progress.say("---\n" + greedy_text(rounded.model, tokenizer, prompt))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

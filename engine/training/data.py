"""Token windows: shuffled ones for training, every held-out token once for the score.

Owns how a corpus becomes tensors of ids. Knows nothing of models. A window's state starts at zero
at its first token.

Letters: B windows, T tokens of one window.

The text: which files, which of them are held out, and a hash that says it all.

Owns the choice of files and the split. Knows nothing of tokens.

The byte-level BPE of a trained model: made from the training files, loaded by any tool.

Owns the tokenizer's form. Knows nothing of windows or models.
"""

import hashlib
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from cottention.engine.errors import ConfigurationError

LEFT_OUT_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
WRITTEN_BY_THE_BUILD = ("_sysconfigdata", "config-")
"""Names of files and folders that differ from machine to machine."""

HELD_OUT_ONE_IN = 20

CHARACTER_TABLES = "encodings/"
"""The standard library's character tables: so much alike that a model knows the held-out ones."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file: its path below the corpus folder, with forward slashes, and its text."""

    path: str
    text: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode("utf-8"))


@dataclass(frozen=True, slots=True)
class Corpus:
    """Training files, held-out files and the hash over the paths and contents of both."""

    training: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]
    sha256: str


def standard_library() -> Path:
    """Where the running interpreter keeps its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def read_corpus(folder: Path) -> Corpus:
    """Read `folder`'s Python files, sorted by path. Raises ConfigurationError if none are left."""
    files = tuple(_distinct(_source_files(folder)))
    held_out = tuple(file for file in files if is_held_out(file.path))
    training = tuple(file for file in files if not is_held_out(file.path))
    if not training or not held_out:
        raise ConfigurationError(
            f"{folder}: {len(training)} training and {len(held_out)} held-out Python files;"
            " both are needed"
        )
    return Corpus(training, held_out, corpus_hash(files))


def is_held_out(path: str) -> bool:
    """One file in twenty, by the SHA-256 of its path alone: the split never depends on a score."""
    digest = hashlib.sha256(path.encode("utf-8")).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def without_tables(files: Sequence[SourceFile]) -> tuple[SourceFile, ...]:
    """Files that are no character tables: what a score means for code that people write."""
    return tuple(file for file in files if not file.path.startswith(CHARACTER_TABLES))


def corpus_hash(files: Sequence[SourceFile]) -> str:
    """SHA-256 over each file's path and text, each ended by a zero byte, in the files' order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.path.encode("utf-8") + b"\0" + file.text.encode("utf-8") + b"\0")
    return digest.hexdigest()


def _source_files(folder: Path) -> Iterator[SourceFile]:
    """Every Python file that counts and is UTF-8, in the order of its path."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    for path in paths:
        if _counts(PurePosixPath(path)):
            try:
                yield SourceFile(path, (folder / path).read_bytes().decode("utf-8"))
            except UnicodeDecodeError:
                continue


def _counts(path: PurePosixPath) -> bool:
    if LEFT_OUT_FOLDERS.intersection(path.parts[:-1]):
        return False
    return not any(part.startswith(WRITTEN_BY_THE_BUILD) for part in path.parts)


def _distinct(files: Iterator[SourceFile]) -> Iterator[SourceFile]:
    """The first file of each text; empty ones are dropped."""
    seen = {""}
    for file in files:
        if file.text not in seen:
            seen.add(file.text)
            yield file


END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A GPT-2 style tokenizer of `vocab_size` ids, in which END_OF_TEXT has id 0.

    Every byte has an id of its own, so that any text comes back exactly.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id that separates texts."""
    token = tokenizer.token_to_id(END_OF_TEXT)
    assert token is not None
    return int(token)


NO_TARGET = -100
"""The target of a place behind a text's end: it is not scored."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Inputs and the tokens that follow them, both int64 [B, T]."""

    inputs: Tensor
    targets: Tensor


def token_stream(
    tokenizer: Tokenizer, files: Sequence[SourceFile], cut_every: int = 0, seed: int = 0
) -> Tensor:
    """All files in one row, int64 [N], each behind an end-of-text id and one more at the end.

    With `cut_every` each text is tokenised in pieces of about so many characters, as a prompt and
    what follows it are.
    """
    end = end_of_text_id(tokenizer)
    places = random.Random(seed)
    ids = [end]
    for file in files:
        pieces = cut(file.text, cut_every, places) if cut_every else [file.text]
        for encoded in tokenizer.encode_batch(pieces):
            ids.extend(encoded.ids)
        ids.append(end)
    return torch.tensor(ids)


def cut(text: str, mean: int, places: random.Random) -> list[str]:
    """`text` in pieces of `mean` characters on average; every other cut is moved behind a space."""
    pieces = []
    start = 0
    while start < len(text):
        stop = start + places.randint(1, 2 * mean)
        if places.random() < 0.5:
            stop = text.find(" ", stop) + 1 or len(text)
        pieces.append(text[start:stop])
        start = stop
    return pieces


def batches_per_epoch(stream: Tensor, context: int, batch: int) -> int:
    """Full batches that one pass gives, whatever its offset. ConfigurationError where none."""
    each = (len(stream) - 1 - context) // context // batch
    if each < 1:
        raise ConfigurationError(
            f"the text has {len(stream)} tokens, too few for a batch of {batch} windows of"
            f" {context}: give more text, or a smaller --batch-tokens or --context"
        )
    return each


def epoch_batch(stream: Tensor, context: int, batch: int, seed: int, step: int) -> Windows:
    """Batch number `step` of training: a function of its arguments alone, so runs can resume.

    Each pass over the stream cuts it at another random offset and shuffles the windows.
    """
    each = batches_per_epoch(stream, context, batch)
    epoch, index = divmod(step, each)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    offset = int(torch.randint(context, (), generator=generator))
    count = (len(stream) - 1 - offset) // context
    order = torch.randperm(count, generator=generator)[index * batch : (index + 1) * batch]
    places = (offset + order * context).unsqueeze(1) + torch.arange(context)
    return Windows(stream[places], stream[places + 1])


def held_out_windows(
    tokenizer: Tokenizer, files: Sequence[SourceFile], context: int
) -> list[Windows]:
    """Non-overlapping windows, each [1, up to `context`], that have every token as a target once.

    A file's first window starts behind an end-of-text id; each later one behind the token before
    it, which is all that it sees of what came earlier.
    """
    end = end_of_text_id(tokenizer)
    windows = []
    for encoded in tokenizer.encode_batch([file.text for file in files]):
        row = torch.tensor([end, *encoded.ids])
        for start in range(0, len(row) - 1, context):
            targets = row[start + 1 : start + 1 + context]
            inputs = row[start : start + len(targets)]
            windows.append(Windows(inputs.unsqueeze(0), targets.unsqueeze(0)))
    return windows


def padded_batches(windows: Sequence[Windows], batch: int) -> Iterator[Windows]:
    """Windows of like length together, `batch` at a time, short ones filled up behind their end."""
    ordered = sorted(windows, key=lambda window: -window.inputs.shape[1])
    for start in range(0, len(ordered), batch):
        group = ordered[start : start + batch]
        length = group[0].inputs.shape[1]
        yield Windows(
            torch.cat([_filled(window.inputs, length, 0) for window in group]),
            torch.cat([_filled(window.targets, length, NO_TARGET) for window in group]),
        )


def _filled(row: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(row, (0, length - row.shape[1]), value=value)

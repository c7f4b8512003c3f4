"""From a folder of Python files to batches of token ids: corpus, tokenizer and windows.

Files are read, de-duplicated and split into training and held-out files; a byte-level BPE tokenizer
is trained on the former. Training batches are shuffled windows of one long row of ids; held-out
windows have every token once as a target. The model's state is zero at the start of a window.

Letters: B windows, T tokens of a window, N tokens of the training text.
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

EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
GENERATED_PREFIXES = ("_sysconfigdata", "config-")
"""Prefixes of files and folders that the build of Python generates; they differ by machine."""

HELD_OUT_ONE_IN = 20

CHARACTER_TABLES = "encodings/"
"""Character tables of the standard library. They resemble each other, so scores leave them out."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file: its path relative to the corpus folder, with forward slashes, and its text."""

    path: str
    text: str

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text.encode("utf-8"))


@dataclass(frozen=True, slots=True)
class Corpus:
    """Training files, held-out files, and the hash of the paths and contents of both."""

    training: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]
    sha256: str


def standard_library() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def read_corpus(folder: Path) -> Corpus:
    """Read the Python files below `folder`, sorted by path.

    Tests, generated, empty, duplicate and non-UTF-8 files are skipped. Raises ConfigurationError if
    there is no training file or no held-out file.
    """
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
    """One file in twenty, by the SHA-256 of its path alone: independent of any score."""
    digest = hashlib.sha256(path.encode("utf-8")).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def without_character_tables(files: Sequence[SourceFile]) -> tuple[SourceFile, ...]:
    """The files outside `encodings/`."""
    return tuple(file for file in files if not file.path.startswith(CHARACTER_TABLES))


def corpus_hash(files: Sequence[SourceFile]) -> str:
    """SHA-256 of the paths and texts in the given order, each followed by a zero byte."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.path.encode("utf-8") + b"\0" + file.text.encode("utf-8") + b"\0")
    return digest.hexdigest()


def _source_files(folder: Path) -> Iterator[SourceFile]:
    """Every included Python file that is valid UTF-8, in the order of paths."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    for path in paths:
        if _is_included(PurePosixPath(path)):
            try:
                yield SourceFile(path, (folder / path).read_bytes().decode("utf-8"))
            except UnicodeDecodeError:
                continue


def _is_included(path: PurePosixPath) -> bool:
    if EXCLUDED_FOLDERS.intersection(path.parts[:-1]):
        return False
    return not any(part.startswith(GENERATED_PREFIXES) for part in path.parts)


def _distinct(files: Iterator[SourceFile]) -> Iterator[SourceFile]:
    """The first file of each text; empty files are skipped."""
    seen = {""}
    for file in files:
        if file.text not in seen:
            seen.add(file.text)
            yield file


END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A GPT-2 style byte-level BPE tokenizer of `vocab_size` ids; END_OF_TEXT has id 0.

    Every byte has an id, so any text can be encoded and decoded without loss.
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


IGNORE_INDEX = -100
"""Target of padding positions: ignored by `cross_entropy`."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Input ids and the ids that follow them, both int64 [B, T]."""

    inputs: Tensor
    targets: Tensor


def token_stream(
    tokenizer: Tokenizer, files: Sequence[SourceFile], cut_every: int = 0, seed: int = 0
) -> Tensor:
    """The ids of all files in a row, int64 [N], with an end-of-text id before each and at the end.

    With `cut_every`, texts are split into pieces of that many characters on average, which are
    tokenised apart, like a prompt and its continuation.
    """
    end = end_of_text_id(tokenizer)
    rng = random.Random(seed)
    ids = [end]
    for file in files:
        pieces = split_text(file.text, cut_every, rng) if cut_every else [file.text]
        for encoded in tokenizer.encode_batch(pieces):
            ids.extend(encoded.ids)
        ids.append(end)
    return torch.tensor(ids)


def split_text(text: str, mean: int, rng: random.Random) -> list[str]:
    """`text` in pieces of `mean` characters on average; every other cut is moved behind a space."""
    pieces = []
    start = 0
    while start < len(text):
        stop = start + rng.randint(1, 2 * mean)
        if rng.random() < 0.5:
            stop = text.find(" ", stop) + 1 or len(text)
        pieces.append(text[start:stop])
        start = stop
    return pieces


def batches_per_epoch(stream: Tensor, context: int, batch: int) -> int:
    """Full batches in one pass, whatever its offset. Raises ConfigurationError if there is none."""
    num_batches = (len(stream) - 1 - context) // context // batch
    if num_batches < 1:
        raise ConfigurationError(
            f"the text has {len(stream)} tokens, too few for a batch of {batch} windows of"
            f" {context}: give more text, or a smaller --batch-tokens or --context"
        )
    return num_batches


def training_batch(stream: Tensor, context: int, batch: int, seed: int, step: int) -> Windows:
    """Batch number `step`. A function of its arguments only, so that a run can be resumed.

    Each pass over the stream starts at another random offset and shuffles the windows.
    """
    epoch, index = divmod(step, batches_per_epoch(stream, context, batch))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    offset = int(torch.randint(context, (), generator=generator))
    num_windows = (len(stream) - 1 - offset) // context
    order = torch.randperm(num_windows, generator=generator)[index * batch : (index + 1) * batch]
    indices = (offset + order * context).unsqueeze(1) + torch.arange(context)
    return Windows(stream[indices], stream[indices + 1])


def held_out_windows(
    tokenizer: Tokenizer, files: Sequence[SourceFile], context: int
) -> list[Windows]:
    """Non-overlapping windows, each [1, up to `context`], that have every token once as a target.

    The first window of a file starts with an end-of-text id, each later one with the token before
    its first target.
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
    """Windows of similar length, `batch` at a time, padded at the end with IGNORE_INDEX targets."""
    ordered = sorted(windows, key=lambda window: -window.inputs.shape[1])
    for start in range(0, len(ordered), batch):
        group = ordered[start : start + batch]
        length = group[0].inputs.shape[1]
        yield Windows(
            torch.cat([_padded(window.inputs, length, 0) for window in group]),
            torch.cat([_padded(window.targets, length, IGNORE_INDEX) for window in group]),
        )


def _padded(row: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(row, (0, length - row.shape[1]), value=value)

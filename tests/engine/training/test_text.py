"""Text of training: choice of files, split, tokenizer, windows."""

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from cottention.engine.errors import ConfigurationError
from cottention.engine.training.data import (
    END_OF_TEXT,
    IGNORE_INDEX,
    SourceFile,
    batches_per_epoch,
    end_of_text_id,
    held_out_windows,
    is_held_out,
    padded_batches,
    read_corpus,
    split_text,
    token_stream,
    train_tokenizer,
    training_batch,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["def f(self):\n    return self\n"] * 4, 300)


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8"))
    return folder


def test_the_split_depends_on_the_path_alone() -> None:
    held_out = [f"module_{i}.py" for i in range(60) if is_held_out(f"module_{i}.py")]
    assert held_out == ["module_10.py", "module_37.py"]


def test_left_out_are_tests_duplicates_empty_files_and_what_the_build_wrote(tmp_path: Path) -> None:
    corpus = read_corpus(
        write(
            tmp_path,
            {
                "module_10.py": "held = 'out'\n",
                "module_7.py": "a = 1\r\n",
                "copy/of/module_7.py": "a = 1\r\n",
                "test/module.py": "b = 1\n",
                "x/tests/module.py": "c = 1\n",
                "site-packages/module.py": "d = 1\n",
                "_sysconfigdata_linux.py": "e = 1\n",
                "notes.txt": "f = 1\n",
                "empty.py": "",
            },
        )
    )
    assert corpus.training == (SourceFile("copy/of/module_7.py", "a = 1\r\n"),)
    assert corpus.held_out == (SourceFile("module_10.py", "held = 'out'\n"),)


def test_files_that_are_not_utf_8_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, {"module_10.py": "a = 1\n", "module_7.py": "b = 1\n"})
    before = read_corpus(tmp_path)
    (tmp_path / "latin.py").write_bytes(b"c = '\xe9'\n")
    assert read_corpus(tmp_path) == before


def test_the_corpus_hash_covers_paths_and_contents(tmp_path: Path) -> None:
    first = {"module_10.py": "a = 1\n", "module_7.py": "b = 1\n"}
    hashes = {
        read_corpus(write(tmp_path / str(i), files)).sha256
        for i, files in enumerate(
            [first, first, first | {"module_7.py": "b = 2\n"}, first | {"module_8.py": "c = 1\n"}]
        )
    }
    assert len(hashes) == 3


def test_a_corpus_without_held_out_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="1 training and 0 held-out"):
        read_corpus(write(tmp_path, {"module_7.py": "a = 1\n"}))


@pytest.mark.parametrize(
    "text", ["", " a\tb\r\n\n  c ", "naïve — 日本 🙂\u200d", "\x00\x7f\x1b", "def f():\n\treturn 1"]
)
def test_the_tokenizer_gives_any_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_end_of_text_has_one_id(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(END_OF_TEXT).ids == [end_of_text_id(tokenizer)] == [0]


def test_the_stream_separates_files(tokenizer: Tokenizer) -> None:
    files = [SourceFile("a.py", "self"), SourceFile("b.py", "return")]
    ids = [tokenizer.encode(file.text).ids for file in files]
    assert token_stream(tokenizer, files).tolist() == [0, *ids[0], 0, *ids[1], 0]


def test_an_epoch_shows_each_window_once_and_the_next_one_others() -> None:
    stream = torch.arange(1000)
    each = batches_per_epoch(stream, 8, 4)
    batches = [training_batch(stream, 8, 4, seed=1, step=step) for step in range(each + 1)]
    for batch in batches:
        assert torch.equal(batch.inputs + 1, batch.targets)
    starts = torch.cat([batch.inputs[:, 0] for batch in batches[:-1]]).tolist()
    assert len(set(starts)) == len(starts) == 4 * each
    assert len({start % 8 for start in starts}) == 1
    again = training_batch(stream, 8, 4, seed=1, step=each)
    assert torch.equal(again.inputs, batches[-1].inputs)
    assert not torch.equal(batches[-1].inputs, batches[0].inputs)


def test_too_little_text_for_a_batch_is_said() -> None:
    assert batches_per_epoch(torch.arange(41), 8, 4) == 1
    for num in (0, 1, 40):
        with pytest.raises(ConfigurationError, match=f"{num} tokens.* 4 windows of 8"):
            batches_per_epoch(torch.arange(num), 8, 4)


def test_every_held_out_token_is_a_target_once(tokenizer: Tokenizer) -> None:
    text = "def f(self):\n    return self.x * 1234567\n"
    ids = tokenizer.encode(text).ids
    windows = held_out_windows(tokenizer, [SourceFile("a.py", text)], 5)
    assert torch.cat([window.targets[0] for window in windows]).tolist() == ids
    assert torch.cat([window.inputs[0] for window in windows]).tolist() == [0, *ids[:-1]]
    padded = torch.cat([batch.targets.flatten() for batch in padded_batches(windows, 3)])
    assert sorted(padded[padded != IGNORE_INDEX].tolist()) == sorted(ids)


def test_cut_text_is_whole_and_is_cut_behind_spaces_too() -> None:
    text = "def __init__(self, name):\n    self.name = name\n" * 20
    pieces = split_text(text, 30, random.Random(1))
    assert "".join(pieces) == text
    assert 15 < len(text) / len(pieces) < 60
    assert sum(piece.endswith(" ") for piece in pieces) >= len(pieces) // 3
    assert split_text("", 30, random.Random(1)) == []


def test_a_cut_stream_spells_the_same_text() -> None:
    files = [SourceFile("a.py", "import os\n" * 30), SourceFile("b.py", "x = [1, 2, 3]\n" * 9)]
    tokenizer = train_tokenizer((file.text for file in files), 300)
    whole, pieces = (token_stream(tokenizer, files, n, seed=3) for n in (0, 12))
    assert len(pieces) > len(whole)
    assert tokenizer.decode(pieces.tolist()) == tokenizer.decode(whole.tolist())

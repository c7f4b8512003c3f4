"""Which added tokens are special, whichever file says so; the same ids as with transformers."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from cottention.engine.errors import ModelFolderError
from cottention.engine.text.tokenizer import Tokenizer

END = "<|endoftext|>"
TEXTS = ["a<|x|>b<|y|>    c<|endoftext|>", "z    <|x|><|y|>\u00e9"]


@pytest.fixture
def size(folder: Path) -> int:
    """Ids of the vocabulary, which is also the next free id."""
    return Tokenizer.from_folder(folder).num_ids


def write(folder: Path, **files: Any) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def to_older(folder: Path) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [each if isinstance(each, str) else " ".join(each) for each in raw["merges"]]
    (folder / "vocab.json").write_text(json.dumps(raw["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer.json").unlink()


def decoder(size: int, *tokens: tuple[str, bool]) -> dict[str, Any]:
    return {
        str(size + place): {"content": content, "special": special}
        for place, (content, special) in enumerate(tokens)
    }


GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast"}
GPT2 = {"tokenizer_class": "GPT2Tokenizer", "bos_token": END, "unk_token": END}


def files_of(size: int) -> dict[str, dict[str, Any]]:
    """The files beside the vocabulary in each case that is compared with transformers."""
    both = decoder(size, ("<|x|>", False), ("    ", False))
    return {
        "a map alone": {
            "tokenizer_config": GENERIC,
            "special_tokens_map": {"eos_token": "<|x|>", "additional_special_tokens": ["<|y|>"]},
        },
        "a map against a configuration": {
            "tokenizer_config": GENERIC | {"eos_token": "<|x|>"},
            "special_tokens_map": {"eos_token": "<|y|>"},
        },
        "a list of added tokens against a map": {
            "tokenizer_config": GENERIC | {"added_tokens_decoder": both},
            "special_tokens_map": {"eos_token": "<|x|>", "pad_token": "<|y|>"},
        },
        "a map that takes a name away": {
            "tokenizer_config": GENERIC | {"eos_token": "<|x|>"},
            "special_tokens_map": {"eos_token": None},
        },
        "a list of added tokens": {
            "tokenizer_config": GENERIC | {"eos_token": "<|x|>", "added_tokens_decoder": both},
        },
        "added tokens, one of them named": {
            "tokenizer_config": GENERIC | {"eos_token": "<|x|>"},
            "added_tokens": {"<|x|>": size, "    ": size + 1},
        },
        "a token of the model's own": {
            "tokenizer_config": GENERIC
            | {
                "extra_special_tokens": {"image_token": "<|x|>"},
                "pad_token": {"content": "<|y|>", "__type": "AddedToken", "normalized": False},
            },
        },
        "older: added text": {
            "tokenizer_config": GPT2 | {"eos_token": END},
            "added_tokens": {"<|x|>": size, "    ": size + 1},
        },
        "older: a list of added tokens": {
            "tokenizer_config": GPT2
            | {
                "eos_token": "<|x|>",
                "added_tokens_decoder": decoder(size, ("<|x|>", True), ("    ", False)),
            },
        },
    }


@pytest.mark.parametrize("case", list(files_of(0)))
def test_ids_text_and_end_are_those_of_transformers(folder: Path, size: int, case: str) -> None:
    transformers = pytest.importorskip("transformers")
    write(folder, **files_of(size)[case])
    if case.startswith("older"):
        to_older(folder)
    ours, theirs = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.eos_token_id == theirs.eos_token_id
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", ["    ", "\t\t", "w\u00f6rd", "<tag>"])
def test_added_tokens_are_text_unless_they_are_named(folder: Path, size: int, text: str) -> None:
    write(folder, added_tokens={text: size, "[PAD]": size + 1})
    write(folder, special_tokens_map={"pad_token": "[PAD]"})
    to_older(folder)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode(f"{text}[PAD]") == [size, size + 1]
    assert tokenizer.decode([size, size + 1]) == text
    assert size in tokenizer.sampleable_ids


def test_an_entry_that_spells_no_bytes_is_text(folder: Path, size: int) -> None:
    """As the runs of spaces in GPT-NeoX's older vocab.json."""
    to_older(folder)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    write(folder, vocab=vocabulary | {"   ": size, "\u2581the": size + 1})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode([size, size + 1]) == "   \u2581the"


def test_a_named_token_that_the_model_cannot_have_is_left_out(
    folder: Path, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder, special_tokens_map={"eos_token": "<|nowhere|>"})
    tokenizer = Tokenizer.from_folder(folder, max_ids=size)
    assert (tokenizer.num_ids, tokenizer.eos_token_id) == (size, None)
    assert "eos_token is '<|nowhere|>', which is not in the vocabulary" in caplog.text
    assert Tokenizer.from_folder(folder, max_ids=size + 1).eos_token_id == size


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"special_tokens_map": []}, "special_tokens_map.json must hold a JSON object"),
        ({"special_tokens_map": {"eos_token": 5}}, "eos_token must be a token, it is 5"),
        ({"tokenizer_config": {"extra_special_tokens": [7]}}, "has 7, which is no token"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "must be an object"),
        ({"tokenizer_config": {"added_tokens_decoder": {"0": "x"}}}, "gives 'x' the id 0"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {}}}}, "has no token at 'x'"),
        ({"added_tokens": {"x": "y"}}, "'x' must have an id, it has 'y'"),
    ],
)
def test_damage_beside_tokenizer_json_is_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, files: dict[str, Any], words: str
) -> None:
    expected = Tokenizer.from_folder(folder).encode(TEXTS[0])
    write(folder, **files)
    with caplog.at_level(logging.WARNING):
        assert Tokenizer.from_folder(folder).encode(TEXTS[0]) == expected
    (message,) = caplog.messages
    assert words in message
    assert "\n" not in message
    assert str(folder / next(iter(files))) in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pre_tokenizer": None}, "splits text by nothing; only byte-level BPE"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits text by Whitespace; only byte-level"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "model is WordLev"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}, "have one id, 0"),
    ],
)
def test_what_is_no_byte_level_bpe_is_refused(
    folder: Path, change: dict[str, Any], words: str
) -> None:
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text()) | {"added_tokens": []}
    path.write_text(json.dumps(raw | change))
    with pytest.raises(ModelFolderError, match=words):
        Tokenizer.from_folder(folder)


def test_bytes_without_a_token_are_warned_of(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"] = {"type": "BPE", "vocab": {END: 0, "a": 1}, "merges": []}
    path.write_text(json.dumps(raw))
    assert Tokenizer.from_folder(folder).encode("a") == [1]
    assert "has no token for 255 of the 256 bytes" in caplog.text

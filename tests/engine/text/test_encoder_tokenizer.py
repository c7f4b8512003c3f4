"""Tokenizers of encoders: WordPiece from vocab.txt or tokenizer.json, and damaged ones."""

from pathlib import Path

import pytest

from cottention.engine.errors import ModelFolderError
from cottention.engine.text.encoder_tokenizer import EncoderTokenizer
from tests.engine.encoders import copied, encoder_folder

TEXT = "The BIGGER cat\tsat on [MASK]."


def test_a_vocabulary_is_wordpiece_as_bert_has_it() -> None:
    tokenizer = EncoderTokenizer.from_folder(encoder_folder(), 300)
    ids = tokenizer.framed(tokenizer.encode(TEXT))
    tokens = [tokenizer.id_to_token(each) for each in ids]
    assert tokens == [
        *("[CLS]", "the", "big", "##ger", "cat", "sat", "on", "[MASK]", ".", "[SEP]"),
    ]
    assert (tokenizer.mask_token, tokenizer.mask_id) == ("[MASK]", 4)
    assert tokenizer.written(ids) == "[CLS] the bigger cat sat on [MASK]. [SEP]"
    assert tokenizer.encode("Dog 日") == [7, 1], "[UNK] is what has no token"


def test_tokenizer_json_comes_first(tmp_path: Path) -> None:
    folder = copied(encoder_folder(), tmp_path / "model")
    tokenizer = EncoderTokenizer.from_folder(folder, 300)
    tokenizer._backend.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").unlink()
    again = EncoderTokenizer.from_folder(folder, 300)
    assert again.framed(again.encode(TEXT)) == tokenizer.framed(tokenizer.encode(TEXT))
    assert again.mask_id == 4


def test_settings_of_the_tokenizer_are_followed(tmp_path: Path) -> None:
    folder = copied(encoder_folder(), tmp_path / "model")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "mask_token": "w0"}')
    tokenizer = EncoderTokenizer.from_folder(folder, 300)
    assert tokenizer.encode("The") == [1]
    assert tokenizer.mask_token == "w0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb\na\n", "'a' in two lines"),
        ("[PAD]\n[UNK]\n[CLS]\n", r"has no '\[SEP\]'"),
        (None, "it needs tokenizer.json, or vocab.txt"),
        ("\n".join(["[UNK]", "[CLS]", "[SEP]", *map(str, range(300))]), "the model only 300"),
    ],
)
def test_a_damaged_vocabulary_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    folder = copied(encoder_folder(), tmp_path / "model")
    (folder / "vocab.txt").unlink()
    if text is not None:
        (folder / "vocab.txt").write_text(text)
    with pytest.raises(ModelFolderError, match=message):
        EncoderTokenizer.from_folder(folder, 300)

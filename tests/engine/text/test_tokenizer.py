"""Text to ids and back, from both kinds of tokenizer files."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.errors import ModelFolderError, ParameterError
from cottention.engine.execution.loading import load
from cottention.engine.sampling.token_constraints import encode_bad_words
from cottention.engine.text.tokenizer import Tokenizer

TEXTS = ["def __init__(self, ", "", "   \n\t", "naïve café 東京 😀", "a<|endoftext|>b", "\x00\x7f"]


def edit(folder: Path, **changes: Any) -> None:
    """Change tokenizer.json."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def to_older_files(folder: Path, added: dict[str, int], config: dict[str, Any]) -> None:
    """Replace tokenizer.json by the four older files."""
    path = folder / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    path.unlink()


@pytest.fixture(scope="module")
def tokenizer(gptj_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(gptj_folder)


@given(text=st.text(max_size=40))
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.num_ids for i in ids)
    if "<|" not in text:
        assert tokenizer.decode(ids) == text


def test_special_tokens_are_read_but_not_written(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|endoftext|>b")
    assert len(ids) == 3
    assert tokenizer.token_bytes[ids[1]] == b""
    assert tokenizer.decode(ids) == "ab"


def framing_folder(folder: Path) -> list[int]:
    """Make its tokenizer put a special id before every text, and one behind; both."""
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<s>", "</s>"])
    ends = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    backend.save(str(folder / "tokenizer.json"))
    return [token_id for _, token_id in ends]


def test_what_a_post_processor_adds_frames_prompts_alone(folder: Path) -> None:
    before = Tokenizer.from_folder(folder)
    begin, end = framing_folder(folder)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == before.encode(text) == before.framed(ids)
        assert tokenizer.framed(ids) == backend.encode(text).ids == [begin, *ids, end]
    assert encode_bad_words(["ab"], tokenizer) == encode_bad_words(["ab"], before)


def test_others_run_while_a_long_text_is_read(tokenizer: Tokenizer) -> None:
    """Nothing else moves in the process, streams neither, while a library holds Python's lock."""
    reading = threading.Thread(target=tokenizer.encode, args=("x" * 1_000_000,))
    num_moves = 0
    reading.start()
    while reading.is_alive():
        time.sleep(0.001)
        num_moves += 1
    assert num_moves > 10


def test_half_a_character_decodes_to_a_mark(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é")
    if len(ids) > 1:
        assert tokenizer.decode(ids[:1]) == "\ufffd"


@pytest.mark.parametrize("as_object", [False, True])
def test_older_files_give_the_same_ids(folder: Path, as_object: bool) -> None:
    new = Tokenizer.from_folder(folder)
    end = {"content": "<|endoftext|>", "lstrip": False} if as_object else "<|endoftext|>"
    to_older_files(folder, {}, {"bos_token": end, "eos_token": end, "pad_token": None})
    old = Tokenizer.from_folder(folder)
    for text in TEXTS:
        assert old.encode(text) == new.encode(text)
    assert old.token_bytes == new.token_bytes
    assert old.sampleable_ids == new.sampleable_ids


def test_older_files_without_the_optional_ones(folder: Path) -> None:
    new = Tokenizer.from_folder(folder)
    to_older_files(folder, {}, {})
    (folder / "added_tokens.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    old = Tokenizer.from_folder(folder)
    assert old.encode("def __init__(self") == new.encode("def __init__(self")


def test_padding_tokens_are_never_sampled(folder: Path) -> None:
    """As in GPT-J: the vocabulary is filled up with extra tokens, which have ids and no text."""
    size = Tokenizer.from_folder(folder).num_ids
    extra = {f"<|extratoken_{i + 1}|>": size + i for i in range(3)}
    to_older_files(folder, extra, {"eos_token": "<|endoftext|>"})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.num_ids == size + 3
    assert not set(extra.values()) & set(tokenizer.sampleable_ids)
    assert len(tokenizer.sampleable_ids) == size
    assert tokenizer.encode("<|extratoken_2|>") == [size + 1]
    assert tokenizer.decode([size + 1]) == ""


def test_a_special_token_named_twice_keeps_its_number(folder: Path) -> None:
    """The padding token has its number from added_tokens.json, behind the extra tokens."""
    size = Tokenizer.from_folder(folder).num_ids
    to_older_files(folder, {"<|extratoken_1|>": size, "[PAD]": size + 1}, {"pad_token": "[PAD]"})
    assert Tokenizer.from_folder(folder).encode("[PAD]") == [size + 1]


def test_added_tokens_with_a_gap_are_refused(folder: Path) -> None:
    size = Tokenizer.from_folder(folder).num_ids
    to_older_files(folder, {"<|late|>": size + 7}, {})
    with pytest.raises(ModelFolderError, match=f"the id {size + 7}; the next free id is {size}"):
        Tokenizer.from_folder(folder)


def test_added_tokens_that_are_text_have_bytes(folder: Path) -> None:
    size = Tokenizer.from_folder(folder).num_ids
    raw = json.loads((folder / "tokenizer.json").read_text())
    token = raw["added_tokens"][0] | {"id": size, "content": "wörd!", "special": False}
    edit(folder, added_tokens=[*raw["added_tokens"], token])
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("wörd!") == [size]
    assert tokenizer.decode([size]) == "wörd!"


def test_truncation_and_padding_of_the_file_are_ignored(folder: Path) -> None:
    expected = Tokenizer.from_folder(folder).encode("a prompt of some length")
    edit(
        folder,
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        },
    )
    assert Tokenizer.from_folder(folder).encode("a prompt of some length") == expected


@pytest.mark.parametrize("decoder", [None, {"type": "BPEDecoder", "suffix": "</w>"}])
def test_other_kinds_of_tokenizer_are_refused(folder: Path, decoder: Any) -> None:
    edit(folder, decoder=decoder)
    with pytest.raises(ModelFolderError, match="only byte-level BPE"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b'{"model": {"type": "X"}}'])
def test_damaged_tokenizer_json(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelFolderError, match=r"the tokenizer in .* cannot be read"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "[1]"),
        ("merges.txt", "#version: 0.2\nno such merge\n"),
        ("added_tokens.json", "[1, 2]"),
        ("added_tokens.json", '{"a": "b"}'),
        ("tokenizer_config.json", '{"eos_token": 5}'),
        ("tokenizer_config.json", "{"),
    ],
)
def test_damaged_older_files(folder: Path, name: str, content: str) -> None:
    to_older_files(folder, {}, {})
    (folder / name).write_text(content)
    with pytest.raises(ModelFolderError, match=r"added_tokens|cannot be read"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_folder_without_tokenizer(folder: Path, missing: str) -> None:
    to_older_files(folder, {}, {})
    (folder / missing).unlink()
    with pytest.raises(ModelFolderError, match=r"has no tokenizer: it needs tokenizer\.json"):
        Tokenizer.from_folder(folder)


def test_more_ids_than_embeddings(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    to_older_files(folder, {"<|a|>": config["vocab_size"], "<|b|>": config["vocab_size"] + 1}, {})
    words = f"ids up to {config['vocab_size'] + 1}, the model only {config['vocab_size']} embedd"
    with pytest.raises(ModelFolderError, match=words):
        load(folder, EngineConfig(max_slots=1))


def test_embeddings_beyond_the_tokenizer_are_never_sampled_nor_asked(folder: Path) -> None:
    """A tokenizer of the first 260 ids: the other rows of the embedding are padding."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    kept = {token: i for token, i in raw["model"]["vocab"].items() if i < 260}
    merges = [m for m in raw["model"]["merges"] if "".join(m) in kept]
    edit(folder, model=raw["model"] | {"vocab": kept, "merges": merges})
    engine = Engine(folder, EngineConfig(max_slots=4))
    params = SamplingParams(max_tokens=100, temperature=1e9, seed=1, n=4, ignore_eos=True)
    drawn = {i for done in engine.generate(["x"], params) for i in done.token_ids}
    assert max(drawn) < 260
    assert len(drawn) > 150
    with pytest.raises(ParameterError, match="from 0 to 259"):
        engine.submit([260], SamplingParams())

"""Text and JSON of a model folder, however an editor has saved it."""

import json
import logging
from pathlib import Path

import pytest

from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.errors import ModelFolderError
from cottention.engine.text.files import read_json, read_side_json, read_text
from cottention.engine.text.tokenizer import Tokenizer

BOM = b"\xef\xbb\xbf"


def windows(path: Path) -> None:
    """As a text editor of Windows saves it."""
    path.write_bytes(BOM + path.read_bytes().replace(b"\n", b"\r\n"))


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "special_tokens_map.json"],
)
def test_a_mark_and_line_ends_of_windows_change_nothing(folder: Path, name: str) -> None:
    (folder / "generation_config.json").write_text('{\n"eos_token_id": [0, 5],\n"top_k": 3}\n')
    (folder / "special_tokens_map.json").write_text('{\n"eos_token": "<|endoftext|>"\n}\n')
    facts = []
    for change in (None, windows):
        if change is not None:
            change(folder / name)
        engine = Engine(folder, EngineConfig(max_slots=1))
        (done,) = engine.generate(["def"], SamplingParams(max_tokens=4, temperature=0))
        facts.append((done, engine.model_config, engine.default_sampling_params))
    assert facts[0] == facts[1]
    assert facts[0][1].eos_token_ids == (0, 5)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "added_tokens.json"])
def test_older_file_formats_may_have_marks_and_line_ends_of_windows(
    folder: Path, name: str
) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [each if isinstance(each, str) else " ".join(each) for each in raw["merges"]]
    (folder / "vocab.json").write_text(json.dumps(raw["vocab"], indent=1))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "added_tokens.json").write_text(json.dumps({"    ": len(raw["vocab"])}, indent=1))
    (folder / "tokenizer.json").unlink()
    text = "def __init__(self):\n    return"
    expected = Tokenizer.from_folder(folder).encode(text)
    windows(folder / name)
    assert Tokenizer.from_folder(folder).encode(text) == expected


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("utf-16", "it is UTF-16; save it as UTF-8"),
        ("utf-16-le", "it has zero bytes, as UTF-16 has; save it as UTF-8"),
        ("utf-32", "it is UTF-32; save it as UTF-8"),
        ("latin-1", "it is not UTF-8 at byte 7; save it as UTF-8"),
    ],
)
def test_other_encodings_are_named(tmp_path: Path, encoding: str, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes('{"a": "\u00e9"}'.encode(encoding))
    with pytest.raises(ModelFolderError) as caught:
        read_json(path)
    assert str(caught.value) == f"{path} cannot be read as JSON: {words}"


def test_a_path_that_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name, words in (
        ("folder", "Is a directory"),
        ("loop", "symbolic links"),
        ("broken", "is a link to a file that does not exist"),
        ("nowhere", "has no nowhere"),
    ):
        with pytest.raises(ModelFolderError, match=words):
            read_text(tmp_path / name)


def test_a_duplicate_key_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": {"b": 1, "b": 2}, "c": 3}')
    assert read_json(path) == {"a": {"b": 2}, "c": 3}
    assert f"{path} has keys more than once, of which the last counts: 'b'" in caplog.text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{\0}\0", b"[" * 100_000])
def test_a_damaged_side_file_is_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    for name in ("generation_config.json", "special_tokens_map.json", "added_tokens.json"):
        (folder / name).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        Engine(folder, EngineConfig(max_slots=1))
    assert len(caplog.messages) == 3
    assert all(str(folder) in each and "\n" not in each for each in caplog.messages)
    assert read_side_json(folder / "nowhere.json") == {}

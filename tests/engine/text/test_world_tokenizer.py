"""RWKV's World tokenizer: ids as the rwkv package gives them, and vocabularies that are damaged."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from cottention.engine.errors import ConfigurationError, ModelFolderError
from cottention.engine.text.detokenizer import Detokenizer
from cottention.engine.text.read_tokenizer import read_tokenizer
from cottention.engine.text.tokenizer import Tokenizer
from cottention.engine.text.world_tokenizer import WorldTokenizer

BYTES = [f"{byte + 1} {bytes([byte])!r} 1" for byte in range(256)]


@pytest.fixture(scope="module")
def vocabulary(golden: Path) -> Path:
    return golden / "world-tokenizer" / "vocab.txt"


@pytest.fixture(scope="module")
def tokenizer(vocabulary: Path) -> WorldTokenizer:
    return WorldTokenizer.from_file(vocabulary)


@pytest.fixture(scope="module")
def expected(golden: Path) -> Any:
    return json.loads((golden / "world-tokenizer" / "expected.json").read_text("utf-8"))


def test_golden_ids(tokenizer: WorldTokenizer, expected: Any) -> None:
    for case in expected["encode"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["text"]
        assert tokenizer.framed(case["ids"]) == case["ids"]


def test_golden_bytes(tokenizer: WorldTokenizer, expected: Any) -> None:
    for case in expected["decode_bytes"]:
        raw = b"".join(tokenizer.token_bytes[token_id] for token_id in case["ids"])
        assert raw == bytes.fromhex(case["bytes_hex"])


def test_golden_stream_holds_back_incomplete_characters(
    tokenizer: WorldTokenizer, expected: Any
) -> None:
    """A byte each: no text before its last byte, and the whole text at the end."""
    for case in expected["encode"]:
        stream = Detokenizer(tokenizer.token_bytes)
        parts = [stream.push(byte + 1) for byte in case["text"].encode()]
        assert "\ufffd" not in "".join(parts)
        assert "".join(parts) + stream.finish() == case["text"]


def test_the_end_of_text_is_no_text(tokenizer: WorldTokenizer) -> None:
    """Id 0 can be generated; it is in no text, so that nobody can write it."""
    assert tokenizer.eos_token_id == 0
    assert tokenizer.token_bytes[0] == tokenizer.written_bytes[0] == b""
    assert tokenizer.sampleable_ids == list(range(tokenizer.num_ids))
    assert 0 not in tokenizer.encode("<|endoftext|>\0")
    assert not tokenizer.added_tokens
    assert tokenizer.encode_untrusted("a\n\nb", [(1, 2)], {0}) == tokenizer.encode("a\n\nb")


def test_a_folder_s_spelling_of_the_end_of_text(tmp_path: Path, vocabulary: Path) -> None:
    """As templates of published folders write it; in a message it is text, as it is without one."""
    end = "<|rwkv_tokenizer_end_of_text|>"
    (tmp_path / "rwkv_vocab_small.txt").write_bytes(vocabulary.read_bytes())
    plain = read_tokenizer(tmp_path)
    config = {"eos_token": "\n\n", "added_tokens_decoder": {"0": {"content": end, "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    made = read_tokenizer(tmp_path)
    a, b = plain.encode("a\n\n"), plain.encode("b")
    assert made.encode(f"{end}a\n\n{end}b") == [0, *a, 0, *b]
    assert made.encode(f"a\n\n{end[:-1]}") == plain.encode(f"a\n\n{end[:-1]}")
    text = f"{end}b{end}"
    forged = made.encode_untrusted(text, [(len(end), len(text))], {0})
    assert forged == [0, *plain.encode(f"b{end}")]
    assert made.added_tokens[0].content == made.token_text(0) == made.id_to_token(0) == end
    assert made.token_bytes[0] == b""
    assert made.eos_token_id == 0


def test_ids_without_an_entry_are_never_generated() -> None:
    made = WorldTokenizer({**{byte + 1: bytes([byte]) for byte in range(256)}, 300: b"abc"}, "here")
    assert made.num_ids == 301
    assert not {*range(257, 300)} & {*made.sampleable_ids}
    assert made.encode("xabcab") == [121, 300, 98, 99]


def test_strings_of_ids_lose_no_byte(tokenizer: WorldTokenizer) -> None:
    assert tokenizer.id_to_token(98) == tokenizer.token_text(98) == "a"
    assert tokenizer.id_to_token(256) == "<0xFF>"
    assert tokenizer.token_text(256) == "\ufffd"
    assert tokenizer.id_to_token(0) == tokenizer.id_to_token(10**6) == ""


def test_other_threads_run_while_a_text_is_encoded(tokenizer: WorldTokenizer) -> None:
    """As those of a server must: an encoder that kept the interpreter would let none begin."""
    ids: list[int] = []
    counted, is_done = 0, threading.Event()

    def encode() -> None:
        ids.extend(tokenizer.encode("the thing in there, " * 50_000))
        is_done.set()

    thread = threading.Thread(target=encode)
    thread.start()
    while not is_done.wait(0.001):
        counted += 1
    thread.join()
    assert ids
    assert counted > 3


def test_lines_end_as_on_windows_and_keep_other_line_breaks(tmp_path: Path) -> None:
    entries = [*BYTES, "257 'a\u2028\x0b b' 7", '258 "it\'s" 4', "259 b'\\xe4\\xbd' 2"]
    path = tmp_path / "vocab.txt"
    path.write_bytes("\r\n".join([*entries, ""]).encode())
    made = WorldTokenizer.from_file(path)
    assert made.encode("a\u2028\x0b bit's") == [257, 258]
    assert made.token_bytes[259] == b"\xe4\xbd"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("257 'ab'", "line 257 is not"),
        ("257 'ab' 3", "line 257 is not"),
        ("257 ab 2", "line 257 is not"),
        ("257 [1] 1", "line 257 is not"),
        ("-1 'ab' 2", "line 257 is not"),
        ("9999999999999 'ab' 2", "line 257 is not"),
        ("257 '' 0", "line 257 is not"),
        ("257 __import__('os').abort() 2", "line 257 is not"),
        ("257 " + "(" * 3000 + " 2", "line 257 is not"),
        ("256 'ab' 2", "line 257 has an id that an earlier line has, 256"),
        ("", "line 257 is not"),
        ("257 'a' 1", "id 98 is there twice"),
    ],
)
def test_a_damaged_vocabulary_is_refused_in_one_line(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*BYTES, line, "400 'zz' 2"]) + "\n")
    with pytest.raises(ModelFolderError) as caught:
        WorldTokenizer.from_file(path)
    assert why in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_without_an_entry_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(BYTES[:255]))
    with pytest.raises(ModelFolderError, match="no entry for 1 of the 256 bytes, such as 0xff"):
        WorldTokenizer.from_file(path)
    path.write_text("")
    with pytest.raises(ModelFolderError, match="it is empty"):
        WorldTokenizer.from_file(path)


def test_where_a_vocabulary_is_looked_for(
    tmp_path: Path, gptj_folder: Path, vocabulary: Path
) -> None:
    assert isinstance(read_tokenizer(gptj_folder), Tokenizer)
    assert isinstance(read_tokenizer(gptj_folder, str(vocabulary)), WorldTokenizer)
    assert isinstance(read_tokenizer(tmp_path, str(gptj_folder)), Tokenizer)
    with pytest.raises(ConfigurationError, match="--tokenizer nowhere does not exist"):
        read_tokenizer(gptj_folder, "nowhere")
    model = tmp_path / "x070.pth"
    model.touch()
    with pytest.raises(ModelFolderError, match=r"x070\.pth has no tokenizer: .* --tokenizer FILE"):
        read_tokenizer(model)
    (tmp_path / "rwkv_vocab_v20230424.txt").write_bytes(vocabulary.read_bytes())
    for each in (model, tmp_path):
        found = read_tokenizer(each)
        assert isinstance(found, WorldTokenizer)
        assert found.files == (tmp_path / "rwkv_vocab_v20230424.txt",)
